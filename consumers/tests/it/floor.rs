//! Broker, database and consumer for one test, and a publisher that knows what the broker accepted.

use std::path::Path;
use std::time::Duration;

use playground::cluster::{Cluster, Options};
use playground::mosquitto::Mosquitto;
use playground::postgres::{Db, Role};
use playground::program::{Launch, Program};
use playground::scratch::Scratch;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PubAckReason};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use tokio::time::{Instant, sleep, timeout};

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Floor {
    pub(crate) consumer: Program,
    pub(crate) broker: Mosquitto,
    pub(crate) cluster: Cluster,
    scratch: Scratch,
}

impl Floor {
    /// Everything started; the consumer is subscribed.
    pub(crate) async fn new(options: Options, change: impl FnOnce(Launch) -> Launch) -> Self {
        Self::with_broker(options, |_| Vec::new(), change).await
    }

    /// As [`Floor::new`], with further lines of the broker's configuration; they may name files in this directory.
    pub(crate) async fn with_broker(
        options: Options,
        extra: impl FnOnce(&Path) -> Vec<String>,
        change: impl FnOnce(Launch) -> Launch,
    ) -> Self {
        let scratch = Scratch::new().unwrap();
        let cluster = Cluster::start(&scratch, options).await.unwrap();
        let extra = extra(scratch.path());
        let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
        let broker = Mosquitto::start(&scratch, &extra).await.unwrap();
        let launch = Launch::new("mqtt-consumer").envs(cluster.environment()).envs(broker.environment());
        let mut consumer = change(launch).start(scratch.path()).await.unwrap();
        consumer.ready(PATIENCE).await.unwrap();
        Self { consumer, broker, cluster, scratch }
    }

    /// Where everything of this test is.
    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub(crate) async fn db(&self) -> Db {
        self.cluster.connect(Role::Owner).await.unwrap()
    }

    /// One more consumer, subscribed.
    pub(crate) async fn another(&self, change: impl FnOnce(Launch) -> Launch) -> Program {
        let mut consumer = self.start(change).await;
        consumer.ready(PATIENCE).await.unwrap();
        consumer
    }

    /// One more consumer, not waited for.
    pub(crate) async fn start(&self, change: impl FnOnce(Launch) -> Launch) -> Program {
        let launch =
            Launch::new("mqtt-consumer").envs(self.cluster.environment()).envs(self.broker.environment());
        change(launch).start(self.scratch.path()).await.unwrap()
    }

    pub(crate) fn publisher(&self) -> Publisher {
        Publisher::new(self.broker.port())
    }

    /// Waits until the consumer has tried a batch again that it had given up before.
    pub(crate) async fn until_a_commit_is_given_up(&self) {
        const RETRIES: &str = "ingest_write_retries_total";
        let before = self.consumer.metrics().await.unwrap().count(RETRIES);
        until_metric(&self.consumer, RETRIES, before + 1).await;
    }

    /// Waits until COMMITs of the consumer wait for the standby.
    pub(crate) async fn until_commits_wait(&self) {
        let admin = self.cluster.primary().admin().await.unwrap();
        let sql = "SELECT count(*) FROM pg_stat_activity \
                   WHERE application_name = 'tier0-ingest' AND wait_event = 'SyncRep' AND query LIKE '%COMMIT'";
        let deadline = Instant::now() + PATIENCE;
        while admin.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0 {
            assert!(Instant::now() < deadline, "no COMMIT waits for the standby");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the query's number reaches `expected`; then it must be exactly that.
    pub(crate) async fn until(&self, sql: &str, expected: i64) {
        let db = self.db().await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let count: i64 = db.query_one(sql, &[]).await.unwrap().get(0);
            if count >= expected {
                assert_eq!(count, expected, "{sql}");
                return;
            }
            assert!(Instant::now() < deadline, "{sql}: {count} of {expected} after {PATIENCE:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

pub(crate) const READINGS: &str = "SELECT count(*) FROM device_telemetry";

/// Publishes at QoS 1 and counts what the broker acknowledged.
pub(crate) struct Publisher {
    client: AsyncClient,
    events: EventLoop,
    open: usize,
}

impl Publisher {
    fn new(port: u16) -> Self {
        let mut options =
            MqttOptions::new(format!("test-{port}-{:?}", std::thread::current().id()), "127.0.0.1", port);
        options.set_outgoing_inflight_upper_limit(1000);
        options.set_max_packet_size(Some(1 << 20));
        // Between two calls of ours it sends nothing.
        options.set_keep_alive(Duration::from_secs(3_600));
        let (client, events) = AsyncClient::new(options, 20_000);
        Self { client, events, open: 0 }
    }

    pub(crate) fn publish(&mut self, topic: &str, payload: impl Into<Vec<u8>>) {
        self.client.try_publish(topic, QoS::AtLeastOnce, false, payload.into()).unwrap();
        self.open += 1;
    }

    /// Readings `from..to` of one device each, at the present time.
    pub(crate) fn publish_readings(&mut self, from: usize, to: usize) {
        for number in from..to {
            let now = jiff::Timestamp::now();
            self.publish(&topic(number), reading(number, &now.to_string()));
        }
    }

    /// Waits until the broker has acknowledged everything published so far.
    pub(crate) async fn accepted(&mut self) {
        while self.open > 0 {
            match timeout(PATIENCE, self.events.poll()).await.expect("the broker acknowledges") {
                Ok(Event::Incoming(Packet::PubAck(ack))) => {
                    assert_eq!(ack.reason, PubAckReason::Success);
                    self.open -= 1;
                }
                Ok(_) => {}
                Err(error) => panic!("publishing: {error}"),
            }
        }
    }
}

/// Waits until a counter has reached `least`.
pub(crate) async fn until_metric(program: &Program, name: &str, least: u64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let count = program.metrics().await.map(|metrics| metrics.count(name));
        if count.as_ref().is_ok_and(|count| *count >= least) {
            return;
        }
        assert!(Instant::now() < deadline, "{name} of {}: {count:?} of {least}", program.name());
        sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn topic(number: usize) -> String {
    format!("og/field/S/turbine/D-{number}")
}

pub(crate) fn reading(number: usize, time: &str) -> String {
    format!(
        r#"{{"device_id":"D-{number}","device_type":"turbine","site_id":"S","timestamp_utc":"{time}","metrics":{{"rpm":{number}}}}}"#
    )
}
