//! The servers of a benchmark: one replicated Postgres for the run, a new broker for every measurement.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ingest::partitions::{self, Layout};
use ingest::settings::IngestSettings;
use wire::ledger::Ledger;

use playground::cluster::{Cluster, Options};
use playground::mosquitto::Mosquitto;
use playground::postgres::Role;
use playground::program::{Launch, Program};
use playground::scratch::Scratch;

/// A measurement that makes no progress for this long is over (messages of QoS 0 can be lost) or has failed.
const STALL: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(20);
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What a publisher sends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) qos: u8,
    pub(super) messages: u64,
    /// Readings in each message.
    pub(super) array: u16,
    /// Messages a second; `None` is as fast as the broker takes them.
    pub(super) rate: Option<u32>,
    /// As for `device-simulator --trouble`.
    pub(super) trouble: Option<&'static str>,
}

impl Load {
    /// Single readings as fast as the broker takes them.
    pub(super) fn singles(qos: u8, messages: u64) -> Self {
        Self { qos, messages, array: 1, rate: None, trouble: None }
    }

    /// Gateway messages of so many readings, QoS 1.
    pub(super) fn arrays(messages: u64, array: u16) -> Self {
        Self { array, ..Self::singles(1, messages) }
    }

    pub(super) fn rows(&self) -> u64 {
        self.messages * u64::from(self.array)
    }
}

pub(super) struct Floor {
    pub(super) cluster: Cluster,
    pub(super) settings: Vec<String>,
    broker: Option<Mosquitto>,
    scratch: Scratch,
}

impl Floor {
    pub(super) async fn new(settings: Vec<String>) -> anyhow::Result<Self> {
        let scratch = Scratch::new()?;
        let options = Options { settings: Vec::new(), ..Options::default() };
        let cluster =
            Cluster::create(scratch.path(), options).await.context("start Postgres and its standby")?;
        let mut db = cluster.connect(Role::Owner).await?;
        ingest::schema::migrate(&mut db).await?;
        Ok(Self { cluster, settings, broker: None, scratch })
    }

    /// Empty tables, a checkpoint behind us, no broker.
    pub(super) async fn clean(&mut self) -> anyhow::Result<()> {
        if let Some(mut broker) = self.broker.take() {
            broker.kill9().await?;
        }
        let db = self.cluster.connect(Role::Owner).await?;
        db.batch_execute("TRUNCATE device_telemetry, dead_letters").await.context("empty the tables")?;
        self.cluster.connect(Role::Admin).await?.batch_execute("CHECKPOINT").await.context("checkpoint")
    }

    /// A broker without memory of the one before.
    pub(super) async fn broker(&mut self) -> anyhow::Result<&Mosquitto> {
        let data = self.scratch.path().join("mosquitto");
        if data.exists() {
            std::fs::remove_dir_all(&data).with_context(|| format!("remove {}", data.display()))?;
        }
        Ok(self.broker.insert(Mosquitto::start(&self.scratch, &[]).await?))
    }

    pub(super) async fn consumer(&self) -> anyhow::Result<Program> {
        let broker = self.broker.as_ref().context("no broker")?;
        let mut launch =
            Launch::new("mqtt-consumer").envs(self.cluster.environment()).envs(broker.environment());
        for setting in &self.settings {
            launch = launch.args(["--set".to_owned(), setting.clone()]);
        }
        let mut consumer = launch.start(self.scratch.path()).await?;
        consumer.ready(PATIENCE).await?;
        Ok(consumer)
    }

    /// The publisher of every measurement: it sends what it is told, then it ends by itself.
    pub(super) async fn publisher(&self, load: Load) -> anyhow::Result<Program> {
        let broker = self.broker.as_ref().context("no broker")?;
        let ledger = self.ledger_file();
        if ledger.exists() {
            std::fs::remove_file(&ledger).context("remove the ledger of the measurement before")?;
        }
        let rate = load.rate.map_or_else(|| "max".to_owned(), |rate| rate.to_string());
        Launch::new("device-simulator")
            .envs(broker.environment())
            .args(["--rate", &rate, "--connections", "4"])
            .args(["--qos".to_owned(), load.qos.to_string(), "--count".to_owned(), load.messages.to_string()])
            .args(["--array".to_owned(), load.array.to_string()])
            .args(["--ledger".to_owned(), ledger.display().to_string()])
            .args(load.trouble.into_iter().flat_map(|kind| ["--trouble", kind]))
            .start(self.scratch.path())
            .await
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn ledger_file(&self) -> PathBuf {
        self.path("ledger.json")
    }

    /// Partitions for now, when it is not `mqtt-consumer` that writes.
    pub(super) async fn make_partitions(&self) -> anyhow::Result<()> {
        let layout = Layout::new(&IngestSettings::default());
        let now_us = jiff::Timestamp::now().as_microsecond();
        let mut db = self.cluster.connect(Role::Owner).await?;
        let cells = layout.cells_between(now_us - layout.width_us, now_us + 3 * layout.width_us);
        partitions::ensure(&mut db, &layout, &cells).await?;
        Ok(())
    }

    /// What the publisher of this measurement got acknowledged; it has ended.
    pub(super) async fn ledger(&self, publisher: &mut Program) -> anyhow::Result<Ledger> {
        let status = publisher.wait(PATIENCE).await?;
        if !status.success() {
            bail!("device-simulator ended with {status}");
        }
        let text = std::fs::read_to_string(self.ledger_file()).context("read the ledger")?;
        serde_json::from_str(&text).context("understand the ledger")
    }

    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        if let Some(mut broker) = self.broker.take() {
            broker.kill9().await?;
        }
        self.cluster.stop().await
    }
}

/// Counts per second between the first progress and the last, by asking `count` again and again.
pub(super) async fn rate(
    expected: u64,
    mut count: impl AsyncFnMut() -> anyhow::Result<u64>,
) -> anyhow::Result<(f64, u64)> {
    let mut first: Option<(Instant, u64)> = None;
    let mut last = (Instant::now(), 0);
    loop {
        let now = count().await?;
        let at = Instant::now();
        if now > last.1 {
            last = (at, now);
            first.get_or_insert((at, now));
        }
        if now >= expected || (first.is_some() && at - last.0 > STALL) {
            break;
        }
        if first.is_none() && at - last.0 > PATIENCE {
            bail!("nothing arrives");
        }
        tokio::time::sleep(STEP).await;
    }
    let (started, at_start) = first.context("nothing arrives")?;
    let seconds = (last.0 - started).as_secs_f64();
    if seconds <= 0.0 {
        bail!("over before it could be measured: more messages are needed");
    }
    Ok(((last.1 - at_start) as f64 / seconds, last.1))
}
