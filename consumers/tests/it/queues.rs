//! Whose queue it is: declared by a plain publisher, by an administrator, by us; with or without rights; deleted.

use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel};
use playground::cluster::Options;
use tokio::time::{Instant, sleep, timeout};

use std::time::Duration;

use crate::floor::PATIENCE;
use crate::raw_publisher::{Properties, RawPublisher, long, nested, short};
use crate::stage::{QUEUE, SESSIONS, Stage, event, events};

fn table(arguments: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in arguments {
        table.insert((*key).into(), value.clone());
    }
    table
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text))
}

async fn declare(channel: &Channel, queue: &str, arguments: &[(&str, AMQPValue)]) -> Result<(), String> {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), durable, table(arguments)).await;
    declared.map(drop).map_err(|error| error.to_string())
}

/// What most publishers do: `channel.queue_declare(queue, durable=True)` in pika, and no argument.
#[tokio::test]
async fn a_plain_publisher_may_declare_a_classic_queue_of_ours_before_and_after_us() {
    let stage = Stage::prepared(
        Options::alone(),
        &[],
        async |broker| {
            let settings = amqp::Broker { port: broker.port(), ..amqp::Broker::default() };
            let connection = amqp::connect(&settings, "plain publisher").await.unwrap();
            let channel = connection.create_channel().await.unwrap();
            declare(&channel, QUEUE, &[]).await.unwrap();
        },
        // Quorum by default: the queue is a classic one, and used.
        |launch| launch,
    )
    .await;
    stage.publisher(QUEUE).await.publish(events(0, 100).chain(["not json".to_owned()])).await;
    stage.until(SESSIONS, 100).await;
    stage.until("SELECT count(*) FROM dead_letters", 1).await;
    stage.until_waiting(&stage.settings(QUEUE).dead_letter_queue(), 1).await;

    let mut second = stage
        .start("classic", |launch| launch.set("rabbitmq.queue", "ours").set("rabbitmq.queue_type", "classic"))
        .await;
    second.ready(PATIENCE).await.unwrap();
    let (_connection, channel) = stage.channel().await;
    declare(&channel, "ours", &[]).await.unwrap();
    stage.publisher("ours").await.publish(events(100, 200)).await;
    stage.until(SESSIONS, 200).await;
}

/// Every kind of queue that keeps its messages, as a policy or a publisher may have made it.
#[tokio::test]
async fn a_queue_that_is_there_is_used_whatever_its_kind() {
    let stage = Stage::new(Options::alone(), |launch| launch).await;
    let (_connection, channel) = stage.channel().await;
    let kinds: [(&str, &[(&str, AMQPValue)]); 6] = [
        ("plain-classic", &[]),
        ("priority", &[("x-max-priority", AMQPValue::LongInt(5))]),
        ("lazy", &[("x-queue-mode", text("lazy"))]),
        ("plain-quorum", &[("x-queue-type", text("quorum"))]),
        (
            "single",
            &[("x-queue-type", text("quorum")), ("x-single-active-consumer", AMQPValue::Boolean(true))],
        ),
        ("elsewhere", &[("x-dead-letter-exchange", text("amq.topic"))]),
    ];
    for (at, (queue, arguments)) in kinds.into_iter().enumerate() {
        declare(&channel, queue, arguments).await.unwrap();
        let mut consumer = stage.start(queue, |launch| launch.set("rabbitmq.queue", queue)).await;
        consumer.ready(PATIENCE).await.unwrap();
        let (from, to) = (at * 50, at * 50 + 50);
        stage.publisher(queue).await.publish(events(from, to).chain(["not json".to_owned()])).await;
        stage.until(SESSIONS, to as i64).await;
        stage.until("SELECT count(*) FROM dead_letters", at as i64 + 1).await;
        stage.until_waiting(&stage.settings(queue).dead_letter_queue(), 1).await;
        consumer.terminate(PATIENCE).await.unwrap();
        assert_eq!(stage.waiting(queue).await, 0, "{queue}");
    }
}

/// Transient messages, keys as long as AMQP allows, headers up to a frame, no payload at all.
#[tokio::test]
async fn odd_properties_cost_an_event_nothing() {
    let stage = Stage::new(Options::alone(), |launch| launch).await;
    let (_connection, channel) = stage.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let key = "k".repeat(255);
    let options = lapin::options::QueueBindOptions::default();
    channel
        .queue_bind(QUEUE.into(), "amq.topic".into(), key.as_str().into(), options, FieldTable::default())
        .await
        .unwrap();
    let large = table(&[("padding", text(&"x".repeat(100_000)))]);
    for (at, (exchange, key, properties)) in [
        ("", QUEUE, BasicProperties::default().with_delivery_mode(1)),
        ("amq.topic", key.as_str(), BasicProperties::default()),
        ("", QUEUE, BasicProperties::default().with_headers(large)),
        ("", QUEUE, BasicProperties::default().with_priority(255).with_expiration("60000".into())),
    ]
    .into_iter()
    .enumerate()
    {
        for payload in [event(at, 10, "login", "active"), event(at, 30, "active", "active")] {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let sent = channel
                .basic_publish(exchange.into(), key.into(), options, payload.as_bytes(), properties.clone())
                .await;
            assert!(sent.unwrap().await.unwrap().is_ack());
        }
    }
    let empty = channel
        .basic_publish(
            "".into(),
            QUEUE.into(),
            BasicPublishOptions::default(),
            &[],
            BasicProperties::default(),
        )
        .await;
    assert!(empty.unwrap().await.unwrap().is_ack());
    stage.until(SESSIONS, 4).await;
    stage.until("SELECT count(*) FROM dead_letters", 1).await;
}

/// Texts that are no UTF-8 and headers nested thousands deep: the broker passes both on as they are, and no consumer may
/// stumble over them, neither in the queue nor in the dead-letter queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_publishers_write_into_properties_ends_no_connection() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let (_connection, channel) = stage.channel().await;
    let options = lapin::options::QueueBindOptions::default();
    channel
        .queue_bind(QUEUE.into(), "amq.fanout".into(), "".into(), options, FieldTable::default())
        .await
        .unwrap();
    let named = |name: &[u8], value: Vec<u8>| [short(name), value].concat();
    let long_int = |number: i64| [&b"l"[..], &number.to_be_bytes()].concat();
    let hostile = [
        ("", QUEUE.as_bytes(), Properties { content_type: b"\xff\xfe", ..Properties::default() }),
        ("", QUEUE.as_bytes(), Properties { message_id: b"cut \xe2\x82", ..Properties::default() }),
        (
            "",
            QUEUE.as_bytes(),
            Properties { headers: named(b"\x80", b"t\x01".into()), ..Properties::default() },
        ),
        (
            "",
            QUEUE.as_bytes(),
            Properties { headers: named(b"deep", nested(25_000)), ..Properties::default() },
        ),
        ("amq.fanout", b"\xc3(", Properties::default()),
        // As every message of a stream has.
        (
            "",
            QUEUE.as_bytes(),
            Properties { headers: named(b"x-stream-offset", long_int(7)), ..Properties::default() },
        ),
        // A frame's worth: with the count of its deliveries it fits into none.
        (
            "",
            QUEUE.as_bytes(),
            Properties { headers: named(b"a", long(b'S', &[b'x'; 131_030])), ..Properties::default() },
        ),
    ];
    let letters = stage.settings(QUEUE).dead_letter_queue();
    let mut publisher = RawPublisher::connect(stage.broker.port());
    for (at, (exchange, key, properties)) in hostile.iter().enumerate() {
        for payload in [event(at, 10, "login", "active"), event(at, 30, "active", "active")] {
            publisher.publish(exchange, key, payload.as_bytes(), properties);
        }
        publisher.publish("", letters.as_bytes(), b"put here by somebody", properties);
    }
    stage.until(SESSIONS, 7).await;
    // One that the broker moved out by itself, behind the others: it comes back when all of them could be looked at.
    let death =
        [named(b"queue", long(b'S', QUEUE.as_bytes())), named(b"reason", long(b'S', b"expired"))].concat();
    let headers = named(b"x-death", long(b'A', &long(b'F', &death)));
    for payload in [event(9, 10, "login", "active"), event(9, 30, "active", "active")] {
        let moved = Properties { headers: headers.clone(), ..Properties::default() };
        publisher.publish("", letters.as_bytes(), payload.as_bytes(), &moved);
    }
    stage.until(SESSIONS, 8).await;
    assert_eq!(stage.consumer.metrics().await.unwrap().count("rabbitmq_reconnects_total"), 0);
    stage.until_acknowledged().await;
    stage.until_waiting(&letters, 7).await;
}

#[tokio::test]
async fn what_a_plain_publisher_of_a_quorum_queue_must_do_is_in_the_documentation() {
    let stage = Stage::new(Options::alone(), |launch| launch).await;
    let (_connection, channel) = stage.channel().await;
    let refused = declare(&channel, QUEUE, &[]).await.unwrap_err();
    assert!(refused.contains("PRECONDITION_FAILED"), "{refused}");
    let (_connection, channel) = stage.channel().await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(QUEUE.into(), passive, FieldTable::default()).await.unwrap();
    let page = std::fs::read_to_string("../docs/runbooks/rabbitmq-queue.md").unwrap();
    assert!(page.contains("passive=True") && page.contains("PRECONDITION_FAILED"));
}

#[tokio::test]
async fn a_consumer_without_the_right_to_configure_uses_what_is_there() {
    let stage = Stage::new(Options::alone(), |launch| launch).await;
    let broker = &stage.broker;
    broker.control(&["add_user", "reader", "secret"]).await.unwrap();
    broker.control(&["set_permissions", "reader", "^$", "^$", "^$"]).await.unwrap();
    let (_connection, channel) = stage.channel().await;
    declare(&channel, "theirs", &[]).await.unwrap();
    let as_reader = |launch: playground::program::Launch| {
        launch
            .set("rabbitmq.queue", "theirs")
            .set("rabbitmq.username", "reader")
            .set("rabbitmq.password", "secret")
    };
    let mut consumer = stage.start("reader", as_reader).await;
    // First without any right: it says which is missing, waits, and goes on when it is given.
    stage.until_log(&consumer, "`read` on the queue").await;
    broker.control(&["set_permissions", "reader", "^$", "^$", "^theirs$"]).await.unwrap();
    consumer.ready(PATIENCE).await.unwrap();
    stage.until_log(&consumer, "no dead-letter queue").await;
    stage.publisher("theirs").await.publish(events(0, 100).chain(["not json".to_owned()])).await;
    stage.until(SESSIONS, 100).await;
    stage.until("SELECT count(*) FROM dead_letters", 1).await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = consumer.metrics().await.unwrap();
        if metrics.count("ingest_acknowledged_total") == 201 {
            assert_eq!(metrics.labelled("rabbitmq_dead_lettered_total", "way", "table_only"), Some(1.0));
            break;
        }
        assert!(Instant::now() < deadline, "not all is acknowledged");
        sleep(Duration::from_millis(20)).await;
    }
    consumer.terminate(PATIENCE).await.unwrap();
    assert_eq!(stage.waiting("theirs").await, 0);

    // What cannot be used is said in words too.
    for (name, key, value, words) in [
        ("wrong-password", "rabbitmq.password", "wrong", "rabbitmq.password"),
        ("wrong-vhost", "rabbitmq.vhost", "nowhere", "rabbitmq.vhost"),
        ("no-queue", "rabbitmq.queue", "missing", "the right `configure`"),
    ] {
        let program = stage.start(name, |launch| as_reader(launch).set(key, value)).await;
        stage.until_log(&program, words).await;
    }
}

#[tokio::test]
async fn a_queue_of_another_connection_alone_is_waited_for() {
    let stage = Stage::new(Options::alone(), |launch| launch).await;
    let (connection, channel) = stage.channel().await;
    let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare("alone".into(), exclusive, FieldTable::default()).await.unwrap();
    let mut consumer = stage.start("exclusive", |launch| launch.set("rabbitmq.queue", "alone")).await;
    stage.until_log(&consumer, "declared this queue as exclusive").await;
    connection.close(200, "OK".into()).await.unwrap();
    consumer.ready(PATIENCE).await.unwrap();

    // An exclusive consumer keeps everybody else out of a queue that all may use.
    let (connection, channel) = stage.channel().await;
    declare(&channel, "taken", &[]).await.unwrap();
    let options = BasicConsumeOptions { exclusive: true, ..BasicConsumeOptions::default() };
    let _theirs =
        channel.basic_consume("taken".into(), "".into(), options, FieldTable::default()).await.unwrap();
    let mut second = stage.start("taken", |launch| launch.set("rabbitmq.queue", "taken")).await;
    stage.until_log(&second, "an exclusive consumer").await;
    connection.close(200, "OK".into()).await.unwrap();
    second.ready(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn others_that_take_events_away_are_warned_of() {
    let stage = Stage::new(Options::alone(), |launch| launch).await;
    let second = stage.start("second", |launch| launch).await;
    stage.until_log(&second, "others consume from this queue too").await;
    let deadline = Instant::now() + PATIENCE;
    while stage.consumer.metrics().await.unwrap().count("rabbitmq_session_queue_consumers") != 2 {
        assert!(Instant::now() < deadline, "the second is not counted");
        sleep(Duration::from_millis(100)).await;
    }
}

/// Acknowledging does not remove anything from a stream, and a new consumer of it begins after what is there.
#[tokio::test]
async fn a_stream_is_refused_in_words() {
    let stage = Stage::new(Options::alone(), |launch| launch).await;
    let (_connection, channel) = stage.channel().await;
    declare(&channel, "stream", &[("x-queue-type", text("stream"))]).await.unwrap();
    let mut consumer = stage.start("stream", |launch| launch.set("rabbitmq.queue", "stream")).await;
    // Before a message is taken from it.
    let status = timeout(PATIENCE, consumer.wait(PATIENCE)).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(1));
    stage.until_log(&consumer, "queue stream is a stream").await;
    assert_eq!(stage.number("SELECT count(*) FROM user_sessions").await, 0);
}

#[tokio::test]
async fn a_deleted_queue_is_made_anew_and_said_loudly() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events(0, 100)).await;
    stage.until(SESSIONS, 100).await;
    let (_connection, channel) = stage.channel().await;
    channel.queue_delete(QUEUE.into(), QueueDeleteOptions::default()).await.unwrap();
    publisher.publish(events(100, 200)).await;
    stage.until(SESSIONS, 200).await;
    stage.until_log(&stage.consumer, "the queue was gone and has been made anew").await;
    assert_eq!(stage.consumer.metrics().await.unwrap().count("rabbitmq_queue_deleted_total"), 1);
    // Also when nobody of ours was there to see it: its dead letters are left.
    stage.consumer.terminate(PATIENCE).await.unwrap();
    channel.queue_delete(QUEUE.into(), QueueDeleteOptions::default()).await.unwrap();
    stage.consumer.restart().await.unwrap();
    stage.consumer.ready(PATIENCE).await.unwrap();
    assert_eq!(stage.consumer.metrics().await.unwrap().count("rabbitmq_queue_deleted_total"), 1);
    // And the place for dead letters, under a running consumer.
    let letters = stage.settings(QUEUE).dead_letter_queue();
    channel.queue_delete(letters.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    publisher.publish(["not json".to_owned()]).await;
    stage.until("SELECT count(*) FROM dead_letters", 1).await;
    stage.until_log(&stage.consumer, "no queue is bound to exchange").await;
    publisher.publish(events(200, 300)).await;
    stage.until(SESSIONS, 300).await;
    stage.until_acknowledged().await;
}
