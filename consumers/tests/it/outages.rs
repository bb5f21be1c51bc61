//! Nothing accepted is lost when something goes away.

use std::time::Duration;

use playground::child::Reach;
use playground::cluster::Options;
use playground::http;
use tokio::time::{Instant, sleep};

use crate::floor::{Floor, PATIENCE, READINGS, until_metric};

const AHEAD: &str = "ingest_partitions_ahead";
const ACKNOWLEDGED: &str = "ingest_acknowledged_total";

#[tokio::test]
async fn sigterm_drains_and_the_session_keeps_what_comes_meanwhile() {
    let mut floor = Floor::new(Options::alone(), |launch| launch).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 5_000);
    publisher.accepted().await;
    floor.consumer.terminate(PATIENCE).await.unwrap();
    publisher.publish_readings(5_000, 8_000);
    publisher.accepted().await;
    floor.consumer.restart().await.unwrap();
    floor.until(READINGS, 8_000).await;
}

/// Killed with rows on their way into the table, and killed while a COMMIT waits for the standby: the two moments at
/// which the table may, or does, have what the broker was not told of.
#[tokio::test]
async fn a_killed_consumer_leaves_nothing_behind_and_nothing_twice() {
    let mut floor = Floor::new(Options::default(), |launch| launch.set("ingest.max_rows", 200)).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 3_000);
    publisher.accepted().await;
    until_metric(&floor.consumer, ACKNOWLEDGED, 3_000).await;

    // Mid-COPY: the table is locked, so what is read now cannot be committed.
    let mut db = floor.db().await;
    let lock = db.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE device_telemetry IN ACCESS EXCLUSIVE MODE").await.unwrap();
    publisher.publish_readings(3_000, 6_000);
    publisher.accepted().await;
    until_metric(&floor.consumer, "ingest_received_total", 3_001).await;
    assert_eq!(floor.consumer.metrics().await.unwrap().count(ACKNOWLEDGED), 3_000);
    floor.consumer.kill9().await.unwrap();
    lock.rollback().await.unwrap();
    floor.consumer.restart().await.unwrap();
    floor.until(READINGS, 6_000).await;
    // All of it came again.
    until_metric(&floor.consumer, ACKNOWLEDGED, 3_000).await;

    // In COMMIT: the rows are on the primary, the standby has not confirmed them.
    floor.cluster.standby_mut().pause(Reach::Tree);
    publisher.publish_readings(6_000, 9_000);
    publisher.accepted().await;
    floor.until_commits_wait().await;
    assert_eq!(floor.consumer.metrics().await.unwrap().count(ACKNOWLEDGED), 3_000);
    floor.consumer.kill9().await.unwrap();
    floor.cluster.standby_mut().resume();
    floor.consumer.restart().await.unwrap();
    floor.until(READINGS, 9_000).await;
    until_metric(&floor.consumer, ACKNOWLEDGED, 3_000).await;
    let duplicates = floor.consumer.metrics().await.unwrap().count("ingest_duplicates_total");
    assert!(duplicates > 0, "rows committed before the kill came again");
}

/// A cancelled COMMIT would report success for rows that only the primary has. So the connection is dropped, the server's
/// side goes on waiting, and the batch is run again.
#[tokio::test]
async fn a_commit_without_an_answer_is_run_again_and_never_cancelled() {
    let mut floor =
        Floor::new(Options::default(), |launch| launch.set("database.commit_timeout", "1s")).await;
    let mut publisher = floor.publisher();
    floor.cluster.standby_mut().pause(Reach::Tree);
    publisher.publish_readings(0, 500);
    publisher.accepted().await;
    floor.until_a_commit_is_given_up().await;
    floor.until_a_commit_is_given_up().await;
    // Its client is gone.
    floor.until_commits_wait().await;
    assert_eq!(floor.consumer.metrics().await.unwrap().count(ACKNOWLEDGED), 0);
    floor.cluster.standby_mut().resume();
    floor.until(READINGS, 500).await;
    until_metric(&floor.consumer, ACKNOWLEDGED, 500).await;
    let metrics = floor.consumer.metrics().await.unwrap();
    let (rows, duplicates) =
        (metrics.count("ingest_rows_committed_total"), metrics.count("ingest_duplicates_total"));
    assert_eq!(rows + duplicates, 500);
    assert!(duplicates > 0, "what the first try committed was found by a later one");
    let log = std::fs::read_to_string(floor.cluster.primary().log()).unwrap();
    assert!(log.contains("listening on"), "this is the server's log");
    let cancelled: Vec<&str> = log.lines().filter(|line| line.contains("due to user request")).collect();
    assert!(cancelled.is_empty(), "{cancelled:?}");
}

#[tokio::test]
async fn a_primary_that_comes_back_gets_everything() {
    let mut floor =
        Floor::new(Options::default(), |launch| launch.set("database.commit_timeout", "2s")).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 1_000);
    publisher.accepted().await;
    // The upkeep says how it is: five minutes ahead by the defaults.
    until_metric(&floor.consumer, AHEAD, 5).await;
    until_metric(&floor.consumer, "ingest_upkeep_last_success_timestamp_seconds", 1_770_000_000).await;
    let failures = floor.consumer.metrics().await.unwrap().count("ingest_upkeep_failures_total");
    floor.cluster.primary_mut().kill9(Reach::Tree).await.unwrap();
    until_metric(&floor.consumer, "ingest_upkeep_failures_total", failures + 1).await;
    // It may have been in the middle of a look, of which only a part failed.
    let deadline = Instant::now() + PATIENCE;
    while floor.consumer.metrics().await.unwrap().count(AHEAD) != 0 {
        assert!(Instant::now() < deadline, "it still says that partitions are ahead");
        sleep(Duration::from_millis(20)).await;
    }
    publisher.publish_readings(1_000, 4_000);
    publisher.accepted().await;
    floor.cluster.primary_mut().start().await.unwrap();
    floor.until(READINGS, 4_000).await;

    floor.cluster.primary_mut().pause(Reach::Tree);
    publisher.publish_readings(4_000, 6_000);
    publisher.accepted().await;
    floor.until_a_commit_is_given_up().await;
    floor.cluster.primary_mut().resume();
    floor.until(READINGS, 6_000).await;
}

#[tokio::test]
async fn nothing_is_acknowledged_while_the_standby_is_away() {
    let mut floor =
        Floor::new(Options::default(), |launch| launch.set("database.commit_timeout", "2s")).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 100);
    publisher.accepted().await;
    until_metric(&floor.consumer, ACKNOWLEDGED, 100).await;
    floor.cluster.standby_mut().kill9(Reach::Tree).await.unwrap();
    let before = floor.consumer.metrics().await.unwrap().count(ACKNOWLEDGED);
    publisher.publish_readings(100, 2_000);
    publisher.accepted().await;
    floor.until_a_commit_is_given_up().await;
    let metrics = floor.consumer.metrics().await.unwrap();
    assert_eq!(metrics.count(ACKNOWLEDGED), before);
    // The primary answers, and yet nothing can be stored: not ready, and the reason names the database alone.
    let deadline = Instant::now() + PATIENCE;
    let body = loop {
        // Between two tries, or late with its answer.
        match http::get(floor.consumer.port(), "/health/ready").await {
            Ok((503, body)) => break body,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
        sleep(Duration::from_millis(20)).await;
    };
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    let failing: Vec<&str> = body["failing"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(failing, ["postgres"], "{body}");
    floor.cluster.standby_mut().start().await.unwrap();
    floor.until(READINGS, 2_000).await;
    floor.consumer.ready(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn the_broker_may_go_and_come_back() {
    let mut floor = Floor::new(Options::alone(), |launch| launch).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 3_000);
    publisher.accepted().await;
    floor.broker.restart().await.unwrap();
    let mut publisher = floor.publisher();
    publisher.publish_readings(3_000, 5_000);
    publisher.accepted().await;
    floor.until(READINGS, 5_000).await;
}
