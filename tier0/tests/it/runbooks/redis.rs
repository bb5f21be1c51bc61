//! Redis: an instance is down, a Sentinel knows nobody, two masters, a master in the other region.

use std::time::{Duration, Instant};

use playground::redis::MASTER;
use playground::regions::Plan;
use tokio::time::sleep;

use super::bed::{Bed, LIMIT};
use super::book::Book;

const THE_OTHER: &str = "the other test of this file follows it";
const EXCUSES: [super::Excuse; 16] = [
    ("REDISCLI_AUTH=..", "the playground has no passwords"),
    ("redis-cli -p 26379 SENTINEL SET tier0 auth-pass", "the playground has no passwords"),
    ("REPLICAOF redis-region2", super::COMPOSE),
    (
        "kill -CONT",
        "done to a process that is stopped: failover/tests/it/redis.rs, sentinels_that_slept_are_asked_again",
    ),
    ("redis-cli -p 26379 INFO sentinel", "the same"),
    ("redis-cli -p 6380 INFO replication", "only looks, as the diagnosis does"),
    (
        "redis-cli -p 26379 SENTINEL REPLICAS",
        "only looks; \"NOGOODSLAVE\" takes a replica that is not in step",
    ),
    ("the Sentinels are asked again", "an alarm"),
    ("redis.instances has none", "an alarm"),
    ("Redis does not follow", "an alarm"),
    ("Redis has two masters", "an alarm"),
    ("does not answer", "an alarm"),
    ("says master,", "an alarm"),
    ("0 of 3 Sentinels", "an alarm"),
    ("is a replica that", "an alarm"),
    ("nothing is moved", "an alarm"),
];

async fn is_over(bed: &mut Bed, book: &mut Book) {
    book.is_over_when(
        "Every Sentinel answers `OK 3 usable Sentinels`, one instance says `role:master` with `connected_slaves:1`, \
         and `jq .redis.follows` says `true`.",
    );
    bed.until("follows", |status| status.redis.follows).await;
    let deadline = Instant::now() + LIMIT;
    loop {
        let seen = bed.look(book).await;
        let usable = seen.matches("OK 3 usable Sentinels").count() == 3;
        let master = seen.matches("role:master").count() == 1 && seen.contains("connected_slaves:1");
        if usable && master && seen.contains("\"follows\": true") {
            return;
        }
        assert!(Instant::now() < deadline, "{seen}");
        sleep(Duration::from_millis(500)).await;
    }
}

/// The page, without what the other test follows.
fn open(others: &[super::Excuse]) -> Book {
    Book::open("redis", &[&EXCUSES, others].concat())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_led_back_and_a_sentinel_that_knows_nobody_is_told() {
    let mut bed = Bed::start(Plan { redis: true, ..Plan::default() }).await;
    let mut book = open(&[
        ("redis-cli -p 26379 SENTINEL FAILOVER", THE_OTHER),
        ("redis-cli -p 6379 REPLICAOF", THE_OTHER),
    ]);

    // The master is down: the replica takes over, and what comes back is led back to the region of the primary.
    bed.regions.redis.as_mut().unwrap().instances[0].kill9().await.unwrap();
    bed.alarm("does not answer").await;
    bed.look(&mut book).await;
    bed.follow(&mut book, "Mitigation 1").await;
    is_over(&mut bed, &mut book).await;

    // One Sentinel has lost what it knew. (One that names something else is told by the others within seconds.)
    let redis = bed.regions.redis.as_ref().unwrap();
    let answer = redis.sentinels[0].command(&format!("SENTINEL REMOVE {MASTER}")).await.unwrap();
    assert_eq!(answer.trim(), "+OK");
    let master = redis.instances[0].port().to_string();
    let seen = bed.look(&mut book).await;
    assert!(seen.contains("No such master"), "{seen}");
    bed.shell.fill_in("HOST", "127.0.0.1");
    bed.shell.fill_in("PORT", &master);
    bed.follow(&mut book, "Mitigation 2").await;
    is_over(&mut bed, &mut book).await;
    let sentinel = &bed.regions.redis.as_ref().unwrap().sentinels;
    let told = sentinel[0].command(&format!("SENTINEL MASTER {MASTER}")).await.unwrap();
    let right = sentinel[1].command(&format!("SENTINEL MASTER {MASTER}")).await.unwrap();
    for key in ["down-after-milliseconds", "failover-timeout", "parallel-syncs", "quorum"] {
        assert_eq!(setting(&told, key), setting(&right, key), "{key} as the others have it");
    }
    book.close();
    bed.nothing_is_lost().await;
}

/// Somebody has moved the master while the orchestrator is paused, and the old one was made a master again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_redis_masters_one_remains_and_is_moved_back() {
    let mut bed = Bed::start(Plan { redis: true, ..Plan::default() }).await;
    let mut book = open(&[
        ("docker compose up -d redis-region1", THE_OTHER),
        ("redis-cli -p 26379 SENTINEL REMOVE", THE_OTHER),
    ]);
    bed.post("/mode", r#"{"mode":"paused"}"#).await;
    bed.follow(&mut book, "Mitigation 4").await;
    bed.alarm("nothing is moved while paused").await;
    let deadline = Instant::now() + LIMIT;
    let old = &bed.regions.redis.as_ref().unwrap().instances[0];
    // When its role changes, everybody's connections are ended.
    while old.role().await.ok().as_deref() != Some("slave") {
        assert!(Instant::now() < deadline, "the old master does not become a replica");
        sleep(Duration::from_millis(20)).await;
    }
    while old.command("REPLICAOF NO ONE").await.ok().as_deref().map(str::trim) != Some("+OK") {
        assert!(Instant::now() < deadline, "it does not become a master");
        sleep(Duration::from_millis(20)).await;
    }
    bed.alarm("Redis has two masters").await;
    bed.follow(&mut book, "Redis does not follow the primary").await;
    bed.until("one master", |status| !status.alarms.iter().any(|alarm| alarm.contains("two masters"))).await;
    bed.regions.redis.as_mut().unwrap().settled(LIMIT).await.unwrap();
    // "resume, or 4 above"
    bed.follow(&mut book, "Mitigation 4").await;
    is_over(&mut bed, &mut book).await;
    book.close();
    bed.nothing_is_lost().await;
}

fn setting<'a>(answer: &'a str, key: &str) -> Option<&'a str> {
    answer.lines().skip_while(|line| *line != key).nth(2)
}
