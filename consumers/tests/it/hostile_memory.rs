//! `mqtt-consumer` within the memory that docker-compose.yml gives it, whatever strangers with a device's password send.

use std::io::Write;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use playground::cgroup::MemoryLimit;
use playground::cluster::Options;
use playground::program::Launch;
use tokio::time::{Instant, sleep};

use crate::floor::{Floor, PATIENCE, Publisher, READINGS, reading, topic};

/// `mem_limit` of mqtt-consumer in docker-compose.yml.
const LIMIT: u64 = 256 << 20;
const GOOD: usize = 100;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Several times the limit on the wire, many times that when it is unpacked, and good readings between all of it. Each
/// message from a device of its own, so that no limit per device helps.
fn publish_hostile(publisher: &mut Publisher, from: usize) {
    let now = jiff::Timestamp::now().to_string();
    let nothing = gzip(&vec![b' '; 256 << 10]);
    let elements = format!("[{}0]", "0,".repeat(100_000)).into_bytes();
    let packed = gzip(&elements[..200_000]);
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    for at in 0..GOOD {
        let number = from + at;
        publisher.publish(&topic(number), reading(number, &now));
        let stranger = |kind: &str| format!("og/field/S/turbine/{kind}-{number}");
        publisher.publish(&stranger("large"), vec![0xff; 2 << 20]);
        publisher.publish(&stranger("deep"), deep.clone());
        publisher.publish(&stranger("elements"), elements.clone());
        for copy in 0..10 {
            publisher.publish(&stranger(&format!("nothing{copy}")), nothing.clone());
            publisher.publish(&stranger(&format!("packed{copy}")), packed.clone());
        }
    }
}

/// Starts the consumer within the limit and waits until it takes no more, nothing being committed.
async fn taken_within(limit: &MemoryLimit, floor: &mut Floor) {
    floor.consumer.restart().await.unwrap();
    limit.add(floor.consumer.pid().unwrap()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut before = 0;
    loop {
        sleep(Duration::from_secs(2)).await;
        assert_eq!(limit.kills().unwrap(), 0, "killed for its memory with nothing committed");
        let now = floor.consumer.metrics().await.map_or(0, |metrics| metrics.count("ingest_queue_bytes"));
        if now == before && now > 0 {
            return;
        }
        before = now;
        assert!(Instant::now() < deadline, "the queue is never full");
    }
}

#[tokio::test]
async fn what_strangers_send_is_consumed_within_the_memory_limit_and_after_a_restart_too() {
    let limit = MemoryLimit::new("mqtt", LIMIT).unwrap();
    let mut floor =
        Floor::new(Options::alone(), |launch: Launch| launch.set("database.commit_timeout", "2s")).await;
    floor.consumer.terminate(PATIENCE).await.unwrap();
    let mut publisher = floor.publisher();
    publish_hostile(&mut publisher, 0);
    publisher.accepted().await;
    // Nothing can be committed, so everything the consumer takes stays with it.
    let mut db = floor.db().await;
    let lock = db.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE device_telemetry, dead_letters IN SHARE MODE").await.unwrap();
    taken_within(&limit, &mut floor).await;
    // Killed with all of it: the broker delivers again, with what came meanwhile.
    floor.consumer.kill9().await.unwrap();
    publish_hostile(&mut publisher, GOOD);
    publisher.accepted().await;
    taken_within(&limit, &mut floor).await;
    drop(lock);
    floor.until(READINGS, 2 * GOOD as i64).await;
    let kept = "SELECT count(DISTINCT topic) FROM dead_letters WHERE topic LIKE '%-199'";
    floor.until(kept, 23).await;
    floor.consumer.terminate(PATIENCE).await.unwrap();
    let mib = limit.peak().unwrap() >> 20;
    assert_eq!(limit.kills().unwrap(), 0, "killed for its memory; at most {mib} MiB were in use");
    println!("at most {mib} MiB were in use");
}
