//! A broker, a subscriber that judges every message by itself, and a simulator.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use playground::mosquitto::Mosquitto;
use playground::program::{Launch, Program};
use playground::scratch::Scratch;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish, SubscribeReasonCode};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use wire::ledger::{Ledger, Tally};
use wire::topic::Topic;

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// Consumers keep readings of this age by default.
const RETENTION_US: i64 = 24 * 3_600_000_000;
const TOLERANCE_US: i64 = 3_600_000_000;
/// Above what consumers take by default.
const TOO_LARGE: usize = 256 << 10;

pub(crate) struct Stage {
    pub(crate) broker: Mosquitto,
    subscriber: Option<(AsyncClient, JoinSet<Received>)>,
    scratch: Scratch,
}

/// What came out of the broker.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) messages: u64,
    /// Good readings by device, each once, and how many came more than once.
    pub(crate) good: BTreeMap<String, BTreeSet<i64>>,
    pub(crate) repeated: u64,
    pub(crate) dead_letters: BTreeMap<String, u64>,
    pub(crate) sizes: Vec<usize>,
}

impl Stage {
    /// A broker and a subscriber with a persistent session.
    pub(crate) async fn new() -> Self {
        let mut stage = Self::without_subscriber().await;
        let port = stage.broker.port();
        let mut options = MqttOptions::new("witness", "127.0.0.1", port);
        options.set_clean_start(false).set_session_expiry_interval(Some(3600));
        options.set_max_packet_size(Some(4 << 20));
        let (client, mut events) = AsyncClient::new(options, 100);
        client.subscribe(wire::topic::FILTER, QoS::AtLeastOnce).await.unwrap();
        let subscribed = async {
            loop {
                if let Ok(Event::Incoming(Packet::SubAck(ack))) = events.poll().await {
                    assert_eq!(ack.return_codes, [SubscribeReasonCode::Success(QoS::AtLeastOnce)]);
                    return;
                }
            }
        };
        timeout(PATIENCE, subscribed).await.expect("the subscriber subscribes");
        let mut tasks = JoinSet::new();
        tasks.spawn(collect(events));
        stage.subscriber = Some((client, tasks));
        stage
    }

    pub(crate) async fn without_subscriber() -> Self {
        let scratch = Scratch::new().unwrap();
        let broker = Mosquitto::start(&scratch, &[]).await.unwrap();
        Self { broker, subscriber: None, scratch }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A simulator that writes its ledger and summary to this stage.
    pub(crate) async fn simulator(&self, args: &[&str]) -> Program {
        let (ledger, summary) = (self.path("ledger.json"), self.path("summary.json"));
        Launch::new("device-simulator")
            .envs(self.broker.environment())
            .args(["--ledger", ledger.to_str().unwrap(), "--summary", summary.to_str().unwrap()])
            .args(args.iter().copied())
            .start(self.scratch.path())
            .await
            .unwrap()
    }

    /// Runs a simulator to its own end.
    pub(crate) async fn run(&self, args: &[&str]) -> Ledger {
        let mut simulator = self.simulator(args).await;
        let status = simulator.wait(PATIENCE).await.unwrap();
        assert!(status.success(), "{status}: {}", self.log());
        self.ledger()
    }

    pub(crate) fn ledger(&self) -> Ledger {
        read(&self.path("ledger.json"))
    }

    pub(crate) fn summary(&self) -> Value {
        read(&self.path("summary.json"))
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("device-simulator.log")).unwrap()
    }

    /// Everything the broker took until now, as the subscriber got it: a last message of our own marks the end.
    pub(crate) async fn received(&mut self) -> Received {
        let (client, mut tasks) = self.subscriber.take().unwrap();
        client.publish(END, QoS::AtLeastOnce, false, "").await.unwrap();
        timeout(PATIENCE, tasks.join_next()).await.expect("the end arrives").unwrap().unwrap()
    }
}

const END: &str = "og/field/the/end/now";

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

async fn collect(mut events: EventLoop) -> Received {
    let mut received = Received::default();
    loop {
        match events.poll().await {
            Ok(Event::Incoming(Packet::Publish(publish))) if publish.topic == END => return received,
            Ok(Event::Incoming(Packet::Publish(publish))) => received.take(&publish),
            Ok(_) => {}
            // The broker is being restarted; rumqttc connects again at the next poll.
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

impl Received {
    /// Judges a message as the contract does, with nothing of the simulator's own code.
    fn take(&mut self, publish: &Publish) {
        self.messages += 1;
        self.sizes.push(publish.payload.len());
        let topic = Topic::parse(&publish.topic).unwrap();
        if publish.payload.len() > TOO_LARGE {
            return self.dead("too_large");
        }
        match serde_json::from_slice(&publish.payload) {
            Err(_) => self.dead("not_json"),
            Ok(Value::Array(readings)) => readings.iter().for_each(|reading| self.judge(&topic, reading)),
            Ok(reading) => self.judge(&topic, &reading),
        }
    }

    fn dead(&mut self, reason: &str) {
        *self.dead_letters.entry(reason.into()).or_default() += 1;
    }

    fn judge(&mut self, topic: &Topic<'_>, reading: &Value) {
        let strings = ["device_id", "device_type", "site_id", "timestamp_utc"];
        if strings.iter().chain(&["metrics"]).any(|name| reading.get(*name).is_none()) {
            return self.dead("missing_field");
        }
        if strings.iter().any(|name| !reading[*name].is_string()) || !reading["metrics"].is_object() {
            return self.dead("wrong_type");
        }
        let device_id = reading["device_id"].as_str().unwrap();
        if device_id != topic.device_id {
            return self.dead("topic_mismatch");
        }
        let at: Timestamp = reading["timestamp_utc"].as_str().unwrap().parse().unwrap();
        let age = Timestamp::now().as_microsecond() - at.as_microsecond();
        if !(-TOLERANCE_US..=RETENTION_US).contains(&age) {
            return self.dead("timestamp_out_of_range");
        }
        if reading.to_string().contains("\\u0000") {
            return self.dead("rejected_by_database");
        }
        assert_eq!(reading["device_type"], topic.device_type);
        assert_eq!(reading["site_id"], topic.site_id);
        let new = self.good.entry(device_id.into()).or_default().insert(at.as_microsecond());
        self.repeated += u64::from(!new);
    }

    pub(crate) fn tallies(&self) -> BTreeMap<String, Tally> {
        let tally = |times: &BTreeSet<i64>| {
            let mut tally = Tally::default();
            times.iter().for_each(|at| tally.add(*at));
            tally
        };
        self.good.iter().map(|(device, times)| (device.clone(), tally(times))).collect()
    }

    /// Distinct good readings.
    pub(crate) fn readings(&self) -> u64 {
        self.good.values().map(|times| times.len() as u64).sum()
    }

    /// Takes the readings in doubt out; returns how many of them had arrived.
    pub(crate) fn without(&mut self, unknown: &[(String, i64)]) -> u64 {
        let mut arrived = 0;
        for (device, at) in unknown {
            if let Some(times) = self.good.get_mut(device) {
                arrived += u64::from(times.remove(at));
            }
        }
        self.good.retain(|_, times| !times.is_empty());
        arrived
    }
}
