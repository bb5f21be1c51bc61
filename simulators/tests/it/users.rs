//! The real `user-simulator` against a real RabbitMQ: the ledger is what an independent reader of the queue makes of it.

use std::collections::BTreeMap;
use std::time::Duration;

use amqp::Broker;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection};
use playground::metrics::Metrics;
use playground::program::{Launch, Program};
use playground::rabbitmq::RabbitMq;
use playground::scratch::Scratch;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use wire::sessions::SessionLedger;

const PATIENCE: Duration = Duration::from_secs(120);

struct Users {
    broker: RabbitMq,
    scratch: Scratch,
}

impl Users {
    async fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let broker = RabbitMq::start(&scratch, &[]).await.unwrap();
        Self { broker, scratch }
    }

    async fn start(&self, args: &[&str]) -> Program {
        let path = |name: &str| self.scratch.path().join(name).display().to_string();
        Launch::new("user-simulator")
            .envs(self.broker.environment())
            .args(["--ledger", &path("ledger.json"), "--summary", &path("summary.json")])
            .args(args.iter().copied())
            .start(self.scratch.path())
            .await
            .unwrap()
    }

    fn ledger(&self) -> SessionLedger {
        serde_json::from_slice(&std::fs::read(self.scratch.path().join("ledger.json")).unwrap()).unwrap()
    }

    /// Everything in the queue, oldest first.
    async fn drained(&self) -> Vec<Vec<u8>> {
        let broker = Broker { port: self.broker.port(), ..Broker::default() };
        let deadline = Instant::now() + PATIENCE;
        // A queue whose leader is not elected yet, after the broker has come back, does not answer.
        let (_connection, channel, waiting) = loop {
            match opened(&broker).await {
                Ok(opened) => break opened,
                Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
            }
            sleep(Duration::from_millis(50)).await;
        };
        let queue = broker.queue.as_str().into();
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let mut consumer =
            channel.basic_consume(queue, "".into(), options, FieldTable::default()).await.unwrap();
        let mut messages = Vec::new();
        while messages.len() < waiting as usize {
            let message = timeout(PATIENCE, consumer.next()).await.expect("a message").unwrap().unwrap();
            assert_eq!(message.properties.delivery_mode(), &Some(2), "persistent");
            messages.push(message.data);
        }
        assert!(consumer.next().now_or_never().is_none(), "no more than that");
        messages
    }
}

/// A way to the queue, and how much is in it.
async fn opened(broker: &Broker) -> anyhow::Result<(Connection, Channel, u32)> {
    let connection = amqp::connect(broker, "test").await?;
    let channel = connection.create_channel().await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared =
        channel.queue_declare(broker.queue.as_str().into(), passive, FieldTable::default()).await?;
    Ok((connection, channel, declared.message_count()))
}

/// Newest time and status of each session, and logins, read the simple way. Malformed messages are counted.
fn judge(messages: &[Vec<u8>]) -> (BTreeMap<String, (String, String)>, usize, usize) {
    let mut sessions: BTreeMap<String, (String, String)> = BTreeMap::new();
    let (mut malformed, mut reports) = (0, 0);
    let mut see = |entry: &Value, at: &str| {
        let text = |key: &str| entry[key].as_str().map(str::to_owned);
        let (Some(id), Some(status)) = (text("session_id"), text("connection_status")) else { return false };
        let newest = sessions.entry(id).or_default();
        // RFC 3339 of one form sorts as text only with the fraction padded.
        let at = at.trim_end_matches('Z').to_owned();
        if padded(&at) > padded(&newest.0) {
            *newest = (at, status);
        }
        true
    };
    for message in messages {
        let Ok(value) = serde_json::from_slice::<Value>(message) else {
            malformed += 1;
            continue;
        };
        let good = match value["active_users_list"].as_array() {
            Some(list) if value["site_id"].is_string() => {
                reports += 1;
                let at = value["timestamp_utc"].as_str().unwrap();
                list.iter().all(|entry| see(entry, at))
            }
            _ => {
                let known = ["login", "active", "idle", "logout"];
                known.contains(&value["event"].as_str().unwrap_or_default())
                    && see(&value, value["timestamp"].as_str().unwrap())
            }
        };
        malformed += usize::from(!good);
    }
    (sessions, malformed, reports)
}

fn padded(at: &str) -> String {
    match at.split_once('.') {
        Some((seconds, fraction)) => format!("{seconds}.{fraction:0<6}"),
        None => format!("{at}.000000"),
    }
}

fn agree(ledger: &SessionLedger, messages: &[Vec<u8>]) -> (usize, usize) {
    let (sessions, malformed, reports) = judge(messages);
    let found: BTreeMap<&String, &String> = sessions.iter().map(|(id, (_, status))| (id, status)).collect();
    let expected: BTreeMap<&String, &String> =
        ledger.sessions.iter().map(|(id, state)| (id, &state.connection_status)).collect();
    assert_eq!(found, expected);
    for (id, (at, _)) in &sessions {
        let at: jiff::Timestamp = format!("{at}Z").parse().unwrap();
        assert_eq!(ledger.sessions[id].last_activity_us, at.as_microsecond(), "{id}");
    }
    (malformed, reports)
}

#[tokio::test]
async fn what_is_confirmed_is_in_the_queue() {
    let users = Users::new().await;
    let mut simulator = users.start(&["--rate", "max", "--count", "5000", "--users", "200"]).await;
    assert!(simulator.wait(PATIENCE).await.unwrap().success());
    let ledger = users.ledger();
    let messages = users.drained().await;
    assert_eq!((ledger.complete, ledger.confirmed, messages.len()), (true, 5000, 5000));
    assert!(ledger.unknown.is_empty() && ledger.dead_letters.is_empty());
    let (malformed, reports) = agree(&ledger, &messages);
    assert_eq!((malformed, reports as u64), (0, ledger.site_reports));
    assert!(reports > 10 && ledger.sessions.len() > 150, "{reports} {}", ledger.sessions.len());
}

#[tokio::test]
async fn trouble_is_what_the_ledger_says() {
    let users = Users::new().await;
    let mut args = vec!["--rate", "max", "--count", "5000", "--users", "200"];
    for trouble in
        ["out_of_order=0.1", "duplicate=0.1", "not_json=0.05", "missing_field=0.05", "wrong_type=0.05"]
    {
        args.extend(["--trouble", trouble]);
    }
    let mut simulator = users.start(&args).await;
    assert!(simulator.wait(PATIENCE).await.unwrap().success());
    let ledger = users.ledger();
    let messages = users.drained().await;
    assert_eq!(ledger.confirmed, messages.len() as u64);
    assert!(ledger.repeated > 300, "{}", ledger.repeated);
    let (malformed, _) = agree(&ledger, &messages);
    assert_eq!(malformed as u64, ledger.dead_letters.values().sum::<u64>());
    assert!(malformed > 500, "{malformed}");
}

#[tokio::test]
async fn a_broker_that_is_killed_loses_nothing_that_was_confirmed() {
    let mut users = Users::new().await;
    let mut simulator = users.start(&["--rate", "1000", "--count", "8000", "--users", "200"]).await;
    until(&simulator, |metrics| metrics.count("user_simulator_confirmed_total") >= 1000).await;
    users.broker.until_registered(&Broker::default().queue).await.unwrap();
    users.broker.kill9().await.unwrap();
    users.broker.start_again().await.unwrap();
    assert!(simulator.wait(PATIENCE).await.unwrap().success());
    let ledger = users.ledger();
    let messages = users.drained().await;
    assert_eq!(ledger.confirmed + skipped(&users), 8000);
    assert!(messages.len() as u64 >= ledger.confirmed);
    agree(&ledger, &messages);
}

#[tokio::test]
async fn a_broker_that_is_out_of_memory_is_waited_for() {
    let users = Users::new().await;
    // It goes on until it is told to end: nobody knows how long the broker's own tool takes.
    let args = ["--rate", "300", "--users", "200", "--set", "user_simulator.max_behind=10m"];
    let mut simulator = users.start(&args).await;
    until(&simulator, |metrics| metrics.count("user_simulator_confirmed_total") >= 1000).await;
    users.broker.control(&["set_vm_memory_high_watermark", "absolute", "1MB"]).await.unwrap();
    until(&simulator, |metrics| metrics.sum("user_simulator_blocked") == 1.0).await;
    // Longer than a broker is waited for that does not say why it confirms nothing.
    sleep(Duration::from_secs(12)).await;
    let blocked = simulator.metrics().await.unwrap();
    assert_eq!(blocked.sum("user_simulator_blocked"), 1.0);
    let before = blocked.count("user_simulator_confirmed_total");
    users.broker.control(&["set_vm_memory_high_watermark", "0.4"]).await.unwrap();
    until(&simulator, |metrics| metrics.count("user_simulator_confirmed_total") >= before + 1000).await;
    simulator.terminate(PATIENCE).await.unwrap();
    let ledger = users.ledger();
    let messages = users.drained().await;
    // The same connection throughout: nothing had to be published twice.
    assert_eq!((ledger.complete, ledger.repeated, ledger.unknown.len()), (true, 0, 0));
    assert_eq!(ledger.confirmed, messages.len() as u64);
    agree(&ledger, &messages);
}

async fn until(simulator: &Program, reached: impl Fn(&Metrics) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !simulator.metrics().await.is_ok_and(|metrics| reached(&metrics)) {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn skipped(users: &Users) -> u64 {
    let summary = std::fs::read(users.scratch.path().join("summary.json")).unwrap();
    let summary: Value = serde_json::from_slice(&summary).unwrap();
    summary["unconfirmed"].as_u64().unwrap()
}
