//! `rabbitmq-consumer` within the memory that docker-compose.yml gives it, whatever waits in its queue.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use playground::cgroup::MemoryLimit;
use playground::cluster::Options;
use playground::postgres::Role;
use tokio::time::{Instant, sleep};

use crate::floor::PATIENCE;
use crate::stage::{QUEUE, SESSIONS, Stage, events};

/// `mem_limit` of rabbitmq-consumer in docker-compose.yml.
const LIMIT: u64 = 256 << 20;
/// The largest message our broker takes.
const LARGEST: usize = 512 << 10;

/// Publishes so many messages, each confirmed before the next: the broker is no part of what is measured.
async fn publish(stage: &Stage, messages: usize, properties: BasicProperties, payload: &[u8]) {
    let (_connection, channel) = stage.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    for _ in 0..messages {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = properties.clone().with_delivery_mode(2);
        let sent = channel.basic_publish("".into(), QUEUE.into(), options, payload, properties).await;
        assert!(sent.unwrap().await.unwrap().is_ack());
    }
}

/// Consumes what waits under the limit, the tables locked at first, then ends and begins once more.
async fn consumed_within_the_limit(stage: &mut Stage, name: &str, letters: i64) {
    let limit = MemoryLimit::new(name, LIMIT).unwrap();
    // Nothing can be committed, so everything the consumer takes stays with it.
    let mut db = stage.cluster.connect(Role::Owner).await.unwrap();
    let lock = db.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE user_sessions, dead_letters IN ACCESS EXCLUSIVE MODE").await.unwrap();
    stage.consumer.restart().await.unwrap();
    limit.add(stage.consumer.pid().unwrap()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !std::fs::read_to_string(stage.consumer.log()).unwrap().contains("not committed; trying until") {
        assert_eq!(limit.kills().unwrap(), 0, "killed for its memory before anything was tried");
        assert!(Instant::now() < deadline, "nothing is tried");
        sleep(Duration::from_millis(50)).await;
    }
    // Taken until a bound is met, and no further.
    let deadline = Instant::now() + PATIENCE;
    let mut before = 0;
    loop {
        sleep(Duration::from_secs(2)).await;
        assert_eq!(limit.kills().unwrap(), 0, "killed for its memory with nothing committed");
        let now = stage.consumer.metrics().await.unwrap().count("ingest_queue_bytes");
        if now == before && now > 0 {
            break;
        }
        before = now;
        assert!(Instant::now() < deadline, "the queue is never full");
    }
    drop(lock);
    stage.until(SESSIONS, 100).await;
    stage.until("SELECT count(*) FROM dead_letters", letters).await;
    stage.until_acknowledged().await;
    let mib = limit.peak().unwrap() >> 20;
    assert_eq!(limit.kills().unwrap(), 0, "killed for its memory; at most {mib} MiB were in use");
}

async fn stage(extra: &[&str]) -> Stage {
    let mut stage = Stage::prepared(
        Options::alone(),
        extra,
        async |_| {},
        // Every one of them has its letter.
        |launch| {
            launch.set("database.commit_timeout", "2s").set("ingest.dead_letter_bytes_per_device", "1GiB")
        },
    )
    .await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    stage.consumer.terminate(PATIENCE).await.unwrap();
    stage
}

#[tokio::test]
async fn a_queue_full_of_the_largest_messages_is_consumed_within_the_memory_limit() {
    let mut stage = stage(&[]).await;
    let events: Vec<String> = events(0, 100).collect();
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events[..100].to_vec()).await;
    publish(&stage, 900, BasicProperties::default(), &vec![b'x'; LARGEST]).await;
    publisher.publish(events[100..].to_vec()).await;
    consumed_within_the_limit(&mut stage, "large", 900).await;
}

#[tokio::test]
async fn headers_that_are_larger_in_memory_than_on_the_wire_cost_no_more() {
    let mut stage = stage(&[]).await;
    stage.publisher(QUEUE).await.publish(events(0, 100)).await;
    // 100 KB each, and about 50 times that when they are parsed.
    let mut headers = FieldTable::default();
    for number in 0..14_000 {
        headers.insert(format!("{number}").into(), AMQPValue::Void);
    }
    publish(&stage, 1000, BasicProperties::default().with_headers(headers), b"not json").await;
    consumed_within_the_limit(&mut stage, "headers", 1000).await;
}

/// A broker that somebody else set up takes messages up to 128 MiB.
#[tokio::test]
async fn a_message_larger_than_every_bound_is_refused_and_its_neighbours_are_not() {
    let mut stage = stage(&["max_message_size = 134217728"]).await;
    let events: Vec<String> = events(0, 100).collect();
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events[..100].to_vec()).await;
    publish(&stage, 3, BasicProperties::default(), &vec![b'x'; 48 << 20]).await;
    publisher.publish(events[100..].to_vec()).await;
    consumed_within_the_limit(&mut stage, "huge", 3).await;
}
