//! Nothing accepted is lost when something goes away.

use playground::child::Reach;
use playground::cluster::Options;

use crate::floor::{Floor, PATIENCE, READINGS};

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

#[tokio::test]
async fn a_killed_consumer_leaves_nothing_behind_and_nothing_twice() {
    let mut floor = Floor::new(Options::alone(), |launch| launch.set("ingest.max_rows", 200)).await;
    let mut publisher = floor.publisher();
    for round in 0..3 {
        publisher.publish_readings(round * 3_000, (round + 1) * 3_000);
        publisher.accepted().await;
        floor.consumer.kill9().await.unwrap();
        floor.consumer.restart().await.unwrap();
    }
    floor.until(READINGS, 9_000).await;
}

#[tokio::test]
async fn a_primary_that_comes_back_gets_everything() {
    let mut floor =
        Floor::new(Options::default(), |launch| launch.set("database.commit_timeout", "2s")).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 1_000);
    publisher.accepted().await;
    floor.cluster.primary_mut().kill9(Reach::Tree).await.unwrap();
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
    floor.until(READINGS, 100).await;
    floor.cluster.standby_mut().kill9(Reach::Tree).await.unwrap();
    let before = floor.consumer.metrics().await.unwrap().count("ingest_acknowledged_total");
    publisher.publish_readings(100, 2_000);
    publisher.accepted().await;
    floor.until_a_commit_is_given_up().await;
    let metrics = floor.consumer.metrics().await.unwrap();
    assert_eq!(metrics.count("ingest_acknowledged_total"), before);
    floor.cluster.standby_mut().start().await.unwrap();
    floor.until(READINGS, 2_000).await;
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
