//! The real `rabbitmq-consumer` between a real RabbitMQ and a real Postgres: nothing lost, whatever goes away.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::BasicConsumeOptions;
use lapin::types::{AMQPValue, FieldTable};
use playground::child::Reach;
use playground::cluster::Options;
use playground::postgres::Role;
use tokio::time::{Instant, sleep, timeout};

use crate::floor::PATIENCE;
use crate::stage::{QUEUE, SESSIONS, Stage, event, events};

#[tokio::test]
async fn sessions_follow_their_newest_event_and_reports_are_kept() {
    let mut stage = Stage::new(Options::default(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events(0, 1_000)).await;
    stage.until(SESSIONS, 1_000).await;
    let report = r#"{"message_id":"m1","timestamp_utc":"2026-02-03T04:05:00Z","site_id":"SFO-WEB-01",
        "metrics":{"active_users":2,"server_cpu_pct":31.5},"active_users_list":[
        {"user_id":"user_0001","username":"ann","session_id":"SESS-1","login_time":"2026-02-03T04:00:00Z","ip_address":"10.0.0.1","region":"NA-WEST","connection_status":"idle"}],
        "queue_metadata":{}}"#;
    publisher.publish([report.to_owned(), report.to_owned(), event(2, 400, "logout", "disconnected")]).await;
    publisher.publish([event(2, 300, "active", "active")]).await;
    stage
        .until("SELECT count(*) FROM user_sessions WHERE connection_status = 'idle' AND username = 'ann'", 1)
        .await;
    stage
        .until("SELECT count(*) FROM user_sessions WHERE connection_status = 'disconnected' AND logout_time = '2026-02-03T04:06:40Z'", 1)
        .await;
    stage.until("SELECT count(*) FROM site_activity WHERE site_id = 'SFO-WEB-01'", 1).await;
    stage.until(SESSIONS, 998).await;
    stage.until_acknowledged().await;
}

#[tokio::test]
async fn a_broker_killed_and_restarted_in_mid_stream_loses_nothing() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    publisher.publish(events(0, 1_000)).await;
    // Delivered, not yet committed: the broker dies with the acknowledgements outstanding.
    stage.cluster.primary_mut().pause(Reach::Tree);
    publisher.publish(events(1_000, 2_000)).await;
    stage.broker.kill9().await.unwrap();
    stage.cluster.primary_mut().resume();
    stage.broker.start_again().await.unwrap();
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events(2_000, 3_000)).await;
    stage.until(SESSIONS, 3_000).await;
    assert!(stage.consumer.metrics().await.unwrap().count("rabbitmq_reconnects_total") > 0);
    stage.until_acknowledged().await;
}

/// Ended as soon as its rows show, so with their acknowledgements hardly sent: they count all the same.
#[tokio::test]
async fn an_orderly_end_leaves_nothing_with_the_broker_that_is_committed() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    for round in 0..10 {
        publisher.publish(events(round * 300, (round + 1) * 300)).await;
        stage.until(SESSIONS, 300 * (round as i64 + 1)).await;
        stage.consumer.terminate(PATIENCE).await.unwrap();
        assert_eq!(stage.waiting(QUEUE).await, 0, "round {round}");
        stage.consumer.restart().await.unwrap();
        stage.consumer.ready(PATIENCE).await.unwrap();
        assert_eq!(
            stage.consumer.metrics().await.unwrap().count("ingest_received_total"),
            0,
            "round {round}"
        );
    }
}

/// Killed after every COMMIT it managed to make and before the acknowledgement of the last: the standby, whose answer a
/// COMMIT waits for, is away while rows are already written on the primary.
#[tokio::test]
async fn a_consumer_killed_between_commit_and_acknowledgement_loses_nothing() {
    let mut stage = Stage::new(Options::default(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events(0, 500)).await;
    stage.until(SESSIONS, 500).await;
    stage.cluster.standby_mut().pause(Reach::Tree);
    publisher.publish(events(500, 1_000)).await;
    // The commit record is on the primary; only the wait for the standby hides its rows.
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'tier0-ingest'";
    let deadline = Instant::now() + PATIENCE;
    // What another role's sessions do only the superuser sees.
    let admin = stage.cluster.primary().admin().await.unwrap();
    while admin.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 0 {
        assert!(Instant::now() < deadline, "no commit waits for the standby");
        sleep(Duration::from_millis(10)).await;
    }
    stage.consumer.kill9().await.unwrap();
    stage.cluster.standby_mut().resume();
    // What had been committed shows without any consumer, be it the first event only; nothing of it was acknowledged.
    let deadline = Instant::now() + PATIENCE;
    while stage.number("SELECT count(*) FROM user_sessions").await <= 500 {
        assert!(Instant::now() < deadline, "the commit does not show");
        sleep(Duration::from_millis(10)).await;
    }
    let deadline = Instant::now() + PATIENCE;
    while stage.waiting(QUEUE).await < 1_000 {
        assert!(Instant::now() < deadline, "the broker does not give the messages back");
        sleep(Duration::from_millis(50)).await;
    }
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 1_000).await;
    stage.consumer.ready(PATIENCE).await.unwrap();
    stage.until_acknowledged().await;
}

#[tokio::test]
async fn poison_in_the_middle_of_a_batch_costs_only_itself() {
    let mut stage = Stage::new(Options::alone(), |launch| launch.set("ingest.max_age", "200ms")).await;
    let publisher = stage.publisher(QUEUE).await;
    let mut payloads: Vec<String> = events(0, 100).collect();
    let refused_by_database = r#"{"timestamp_utc":"2026-02-03T04:05:00Z","site_id":"W","metrics":{"x":1e999999},"active_users_list":[]}"#;
    for (at, poison) in
        [(17, "not json"), (60, "[]"), (111, refused_by_database), (150, r#"{"event":"login"}"#)]
    {
        payloads.insert(at, poison.to_owned());
    }
    publisher.publish(payloads).await;
    stage.until(SESSIONS, 100).await;
    stage.until("SELECT count(*) FROM dead_letters WHERE source = 'rabbitmq'", 4).await;

    let letters = stage.settings(QUEUE).dead_letter_queue();
    let connection = amqp::connect(&stage.settings(QUEUE), "test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut consumer = channel
        .basic_consume(letters.as_str().into(), "".into(), options, FieldTable::default())
        .await
        .unwrap();
    let mut found = Vec::new();
    while found.len() < 4 {
        let letter = timeout(PATIENCE, consumer.next()).await.expect("a dead letter").unwrap().unwrap();
        let headers = letter.properties.headers().clone().unwrap();
        let Some(AMQPValue::LongString(reason)) = headers.inner().get("x-tier0-reason").cloned() else {
            panic!("no reason in {headers:?}");
        };
        found.push((reason.to_string(), String::from_utf8(letter.data).unwrap()));
    }
    found.sort();
    let mut expected = [
        ("not_json", "not json"),
        ("wrong_type", "[]"),
        ("rejected_by_database", refused_by_database),
        ("missing_field", r#"{"event":"login"}"#),
    ]
    .map(|(reason, payload)| (reason.to_owned(), payload.to_owned()));
    expected.sort();
    assert_eq!(found, expected);
    stage.until_acknowledged().await;
}

#[tokio::test]
async fn poison_holds_nothing_up_when_the_broker_takes_no_messages() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(["not json".to_owned()]).await;
    stage.until("SELECT count(*) FROM dead_letters", 1).await;
    publisher.publish(events(0, 300).chain(["not json either".to_owned()])).await;
    stage.until("SELECT count(*) FROM dead_letters", 2).await;
    // An alarm blocks every connection that publishes. What consumes goes on, acknowledgements too.
    stage.consumer.terminate(PATIENCE).await.unwrap();
    publisher.publish(events(300, 600).chain(["poison under an alarm".to_owned()])).await;
    stage.broker.control(&["set_vm_memory_high_watermark", "absolute", "1MB"]).await.unwrap();
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 600).await;
    stage.until("SELECT count(*) FROM dead_letters", 3).await;
    stage.consumer.ready(PATIENCE).await.unwrap();
    // The newest message has no copy with the broker and is acknowledged like the others.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = stage.consumer.metrics().await.unwrap();
        let received = metrics.count("ingest_received_total");
        if received >= 301 && metrics.count("ingest_acknowledged_total") == received {
            assert_eq!(metrics.labelled("rabbitmq_dead_lettered_total", "way", "table_only"), Some(1.0));
            assert_eq!(metrics.count("rabbitmq_reconnects_total"), 0);
            assert_eq!(metrics.count("rabbitmq_stale_acknowledgements_total"), 0);
            break;
        }
        assert!(Instant::now() < deadline, "not all is acknowledged");
        sleep(Duration::from_millis(20)).await;
    }
    stage.consumer.terminate(PATIENCE).await.unwrap();
    assert_eq!(stage.waiting(QUEUE).await, 0);
    stage.broker.control(&["set_vm_memory_high_watermark", "0.4"]).await.unwrap();
    let letters = stage.settings(QUEUE).dead_letter_queue();
    // The third copy was given up, and may still have been on its way to the blocked broker.
    assert!((2..=3).contains(&stage.waiting(&letters).await));
}

#[tokio::test]
async fn messages_go_back_to_the_queue_when_the_database_stays_away() {
    let mut stage = Stage::new(Options::alone(), |launch| {
        launch.set("database.commit_timeout", "1s").set("rabbitmq_consumer.requeue_after", "2s")
    })
    .await;
    let publisher = stage.publisher(QUEUE).await;
    stage.cluster.primary_mut().kill9(Reach::Tree).await.unwrap();
    publisher.publish(events(0, 500)).await;
    let deadline = Instant::now() + PATIENCE;
    while stage.consumer.metrics().await.unwrap().count("rabbitmq_requeued_total") == 0 {
        assert!(Instant::now() < deadline, "nothing is given back");
        sleep(Duration::from_millis(50)).await;
    }
    let deadline = Instant::now() + PATIENCE;
    while stage.waiting(QUEUE).await < 1_000 {
        assert!(Instant::now() < deadline, "the messages are not back in the queue");
        sleep(Duration::from_millis(50)).await;
    }
    stage.cluster.primary_mut().start().await.unwrap();
    stage.until(SESSIONS, 500).await;
    stage.until_acknowledged().await;
}

/// `ALTER TABLE`, `VACUUM FULL` or a forgotten transaction of a DBA keep one table locked; everything else is taken. That is no
/// fault of the events that wait.
#[tokio::test]
async fn a_table_that_somebody_locks_for_long_condemns_no_event() {
    let mut stage =
        Stage::new(Options::alone(), |launch| launch.set("database.commit_timeout", "500ms")).await;
    let publisher = stage.publisher(QUEUE).await;
    let mut db = stage.cluster.connect(Role::Owner).await.unwrap();
    let lock = db.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE user_sessions IN ACCESS EXCLUSIVE MODE").await.unwrap();
    publisher.publish(events(0, 4)).await;
    // Far more tries than a message at fault is given.
    let deadline = Instant::now() + PATIENCE;
    while stage.consumer.metrics().await.unwrap().count("ingest_write_retries_total") < 30 {
        assert!(Instant::now() < deadline, "it does not try again");
        sleep(Duration::from_millis(50)).await;
    }
    drop(lock);
    stage.until(SESSIONS, 4).await;
    stage.until_acknowledged().await;
    assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 0);
}

/// Nothing is lost between broker and writers that only a new connection would bring again: the window changes, chunks fill.
#[tokio::test]
async fn a_backlog_is_taken_on_one_connection_each_message_once() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    stage.consumer.terminate(PATIENCE).await.unwrap();
    let publisher = stage.publisher(QUEUE).await;
    for round in 0..10 {
        publisher.publish(events(round * 1_000, (round + 1) * 1_000)).await;
    }
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 10_000).await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = stage.consumer.metrics().await.unwrap();
        assert_eq!(metrics.count("rabbitmq_reconnects_total"), 0);
        if metrics.count("ingest_acknowledged_total") == 20_000
            && metrics.count("rabbitmq_prefetch_messages") == 5_000
        {
            assert_eq!(metrics.count("ingest_received_total"), 20_000);
            break;
        }
        assert!(Instant::now() < deadline, "not all is acknowledged, or the window is not what it should be");
        sleep(Duration::from_millis(50)).await;
    }
}
