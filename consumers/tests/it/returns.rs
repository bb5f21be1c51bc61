//! What the broker itself takes out of the queue, by somebody's policy, reaches the table all the same.

use std::fmt::Debug;
use std::ops::RangeBounds;
use std::time::Duration;

use lapin::BasicProperties;
use lapin::Confirmation;
use lapin::options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, LongString};
use playground::cluster::Options;
use playground::postgres::Role;
use playground::rabbitmq::RabbitMq;
use tokio::time::{Instant, sleep};

use crate::floor::PATIENCE;
use crate::stage::{QUEUE, SESSIONS, Stage, events};

async fn policy(broker: &RabbitMq, pattern: &str, definition: &str) {
    broker.control(&["set_policy", "hostile", pattern, definition, "--apply-to", "queues"]).await.unwrap();
}

/// Kills the consumer so many times with messages delivered and nothing committed.
async fn kill_with_messages_delivered(stage: &mut Stage, times: usize) {
    let mut db = stage.cluster.connect(Role::Owner).await.unwrap();
    let lock = db.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE user_sessions IN ACCESS EXCLUSIVE MODE").await.unwrap();
    for _ in 0..times {
        if !stage.consumer.is_running() {
            stage.consumer.restart().await.unwrap();
        }
        let deadline = Instant::now() + PATIENCE;
        while !stage.consumer.metrics().await.is_ok_and(|metrics| metrics.count("ingest_received_total") > 0)
        {
            // All are in the dead-letter queue: put back after some seconds, and delivered then.
            assert!(Instant::now() < deadline, "nothing is delivered");
            sleep(Duration::from_millis(20)).await;
        }
        stage.consumer.kill9().await.unwrap();
    }
}

fn letters() -> String {
    format!("{QUEUE}.dead-letter")
}

/// Waits until so many were put back, by the count of the process: an event may be stored before it is counted.
async fn until_returned(stage: &Stage, reason: &str, wanted: impl RangeBounds<f64> + Debug) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = stage.consumer.metrics().await.unwrap();
        let returned = metrics.labelled("rabbitmq_returned_total", "reason", reason);
        if returned.is_some_and(|returned| wanted.contains(&returned)) {
            return;
        }
        assert!(Instant::now() < deadline, "{reason}: {returned:?}, not {wanted:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// The policy's pattern is not anchored, as most are not, so it holds for the dead-letter queue too.
#[tokio::test]
async fn events_that_a_delivery_limit_moved_away_reach_the_table() {
    let mut stage = Stage::new(Options::alone(), |launch| launch.set("database.commit_timeout", "2s")).await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    policy(&stage.broker, QUEUE, r#"{"delivery-limit":2}"#).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(["not json".to_owned()]).await;
    stage.until("SELECT count(*) FROM dead_letters", 1).await;
    stage.until_waiting(&letters(), 1).await;
    stage.consumer.terminate(PATIENCE).await.unwrap();
    publisher.publish(events(0, 100)).await;
    kill_with_messages_delivered(&mut stage, 3).await;
    stage.until_waiting(&letters(), 201).await;
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 100).await;
    until_returned(&stage, "delivery_limit", 200.0..=200.0).await;
    // What was refused stays for people.
    stage.until_waiting(&letters(), 1).await;
    stage.until_acknowledged().await;
    assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 1);

    // Once more, with events that went round before, and killed while it puts them back.
    publisher.publish(events(100, 200)).await;
    kill_with_messages_delivered(&mut stage, 8).await;
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 200).await;
    stage.broker.control(&["clear_policy", "hostile"]).await.unwrap();
    until_only_refused(&stage).await;
    stage.until_acknowledged().await;
}

/// Waits until nothing but copies of what was refused is left of the letters. Each kill between its publishing anew and its taking
/// out leaves one copy more. An event that went round three times, which the kills may bring about, waits until the process has run
/// for a minute, and the queue is looked at again a minute after that was found.
async fn until_only_refused(stage: &Stage) {
    let deadline = Instant::now() + 3 * PATIENCE;
    // In the middle of a look at the queue, some of them are in the consumer's hands.
    let mut times = 0;
    while times < 3 {
        let (connection, channel) = stage.channel().await;
        let mut left = Vec::new();
        let options = BasicGetOptions::default();
        while let Some(message) = channel.basic_get(letters().into(), options).await.unwrap() {
            left.push(String::from_utf8(message.delivery.data).unwrap());
        }
        // All of them are in the queue again.
        connection.close(200, "OK".into()).await.unwrap();
        let is_so = !left.is_empty() && left.iter().all(|payload| payload == "not json");
        times = if is_so { times + 1 } else { 0 };
        assert!(Instant::now() < deadline, "{left:?}");
        sleep(Duration::from_secs(1)).await;
    }
}

/// What does not fit into a queue of ours is refused, and its publisher is told; a policy that wants events dropped instead only
/// moves them to the dead-letter queue.
#[tokio::test]
async fn a_limit_of_length_loses_nothing() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    stage.consumer.terminate(PATIENCE).await.unwrap();
    let pattern = format!("^{QUEUE}$");
    policy(&stage.broker, &pattern, r#"{"max-length":50}"#).await;
    let (_connection, channel) = stage.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let mut confirmed = 0;
    for payload in events(0, 100) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = BasicProperties::default().with_delivery_mode(2);
        let sent =
            channel.basic_publish("".into(), QUEUE.into(), options, payload.as_bytes(), properties).await;
        confirmed += i64::from(matches!(sent.unwrap().await.unwrap(), Confirmation::Ack(None)));
    }
    assert!((50..100).contains(&confirmed), "{confirmed} of 200 confirmed");
    stage.consumer.restart().await.unwrap();
    // Two events a session, the last of which may have only one.
    stage.until("SELECT count(*) FROM user_sessions", (confirmed + 1) / 2).await;
    stage.consumer.terminate(PATIENCE).await.unwrap();

    policy(&stage.broker, &pattern, r#"{"max-length":50,"overflow":"drop-head"}"#).await;
    stage.publisher(QUEUE).await.publish(events(0, 100)).await;
    stage.until_waiting(&letters(), 150).await;
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 100).await;
    // What was put back pushed out others, until all were taken.
    stage.until_waiting(&letters(), 0).await;
    until_returned(&stage, "maxlen", 150.0..).await;
    stage.until_acknowledged().await;
}

/// An expiry moves away what nobody took in time, from a queue of ours and from one of somebody else's.
#[tokio::test]
async fn events_that_expired_or_were_pushed_out_reach_the_table() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    stage.consumer.terminate(PATIENCE).await.unwrap();
    policy(&stage.broker, &format!("^{QUEUE}$"), r#"{"message-ttl":100}"#).await;
    stage.publisher(QUEUE).await.publish(events(0, 100)).await;
    stage.until_waiting(&letters(), 200).await;
    stage.broker.control(&["clear_policy", "hostile"]).await.unwrap();
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 100).await;
    until_returned(&stage, "expired", 200.0..=200.0).await;
    stage.until_waiting(&letters(), 0).await;
    stage.until_acknowledged().await;

    // A classic queue with a dead-letter exchange, and a limit that drops from its head.
    let (_connection, channel) = stage.channel().await;
    let mut arguments = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(LongString::from(text));
    arguments.insert("x-dead-letter-exchange".into(), text("theirs.dead-letter"));
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(50));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare("theirs".into(), durable, arguments).await.unwrap();
    let theirs = |launch: playground::program::Launch| launch.set("rabbitmq.queue", "theirs");
    let mut consumer = stage.start("theirs", theirs).await;
    consumer.ready(PATIENCE).await.unwrap();
    consumer.terminate(PATIENCE).await.unwrap();
    stage.publisher("theirs").await.publish(events(100, 200)).await;
    stage.until_waiting("theirs.dead-letter", 150).await;
    consumer.restart().await.unwrap();
    stage.until(SESSIONS, 200).await;
    stage.until_waiting("theirs.dead-letter", 0).await;
}

/// The broker closes a channel whose messages are not acknowledged in time; the database is away for longer.
#[tokio::test]
async fn the_brokers_own_time_limit_for_acknowledgements_loses_nothing() {
    let prepare = async |broker: &RabbitMq| {
        // How often the broker looks has no line in its configuration.
        for setting in ["consumer_timeout, 1000", "channel_tick_interval, 500"] {
            broker.control(&["eval", &format!("application:set_env(rabbit, {setting}).")]).await.unwrap();
        }
    };
    let change = |launch: playground::program::Launch| launch.set("database.commit_timeout", "2s");
    let mut stage = Stage::prepared(Options::alone(), &[], prepare, change).await;
    let mut db = stage.cluster.connect(Role::Owner).await.unwrap();
    let lock = db.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE user_sessions IN ACCESS EXCLUSIVE MODE").await.unwrap();
    stage.publisher(QUEUE).await.publish(events(0, 100)).await;
    stage.until_log(&stage.consumer, "consumer_timeout above rabbitmq_consumer.requeue_after").await;
    drop(lock);
    stage.until(SESSIONS, 100).await;
    stage.until_acknowledged().await;
}

/// The runbook's way to remove what has been looked at, with events in between that nobody has judged.
#[tokio::test]
async fn only_refused_messages_are_removed_from_the_dead_letter_queue() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    stage.publisher(QUEUE).await.publish(["not json".to_owned(), "[]".to_owned()]).await;
    stage.until_waiting(&letters(), 2).await;
    stage.consumer.terminate(PATIENCE).await.unwrap();
    policy(&stage.broker, &format!("^{QUEUE}$"), r#"{"message-ttl":100}"#).await;
    stage.publisher(QUEUE).await.publish(events(0, 100)).await;
    stage.until_waiting(&letters(), 202).await;
    stage.broker.control(&["clear_policy", "hostile"]).await.unwrap();
    // Somebody put this here by hand.
    stage.publisher(&letters()).await.publish(["by hand".to_owned()]).await;
    let mut discard = stage.start("discard", |launch| launch.args(["--discard-refused"])).await;
    assert!(discard.wait(PATIENCE).await.unwrap().success());
    stage.until_log(&discard, "removed=2 others=201").await;
    stage.until_waiting(&letters(), 1).await;
    stage.until_waiting(QUEUE, 200).await;
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 100).await;
    stage.until_acknowledged().await;
    assert_eq!(stage.number("SELECT count(*) FROM dead_letters").await, 2);
}
