//! Regions under telemetry: devices, broker, consumer, two nodes; with agents and orchestrator or without.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::task::JoinSet;
use wire::ledger::Ledger;

use crate::verify::stored::{self, Scope};
use crate::verify::{Report, compare};
use playground::cluster::{Cluster, Options};
use playground::http;
use playground::metrics::Metrics;
use playground::mosquitto::Mosquitto;
use playground::postgres::Role;
use playground::program::{Launch, Program};
use playground::regions::{Plan, Regions};
use playground::scratch::Scratch;

const READY: Duration = Duration::from_secs(120);
/// The simulator waits for acknowledgements, the consumer commits what it holds.
const GRACE: Duration = Duration::from_secs(120);
const REPLAY: Duration = Duration::from_secs(120);
/// Nothing waits and nothing comes for this long: what has not come will not come.
const QUIET: Duration = Duration::from_secs(15);
const DRAIN: Duration = Duration::from_secs(600);
/// How often the consumer is asked what it has committed: the error of a measured gap.
const LOOK: Duration = Duration::from_millis(5);
/// Between two looks at everything.
const PAUSE: Duration = Duration::from_millis(100);

/// Everything of one run. Clients before servers, files last: dropping goes in this order.
#[derive(Debug)]
pub struct Stage {
    pub commits: Commits,
    pub simulator: Program,
    pub consumer: Program,
    pub regions: Option<Regions>,
    pub cluster: Cluster,
    _broker: Mosquitto,
    scratch: Scratch,
}

impl Stage {
    /// Starts everything; `plan` is none for nodes without agents. Returns when rows are being committed.
    ///
    /// # Errors
    /// When something does not come up.
    pub async fn start(rate: u32, plan: Option<Plan>) -> anyhow::Result<Self> {
        let scratch = Scratch::new()?;
        // As shipped: tests' little memory would not be what people run.
        let options = Options { settings: Vec::new(), ..Options::default() };
        let (mut cluster, broker) =
            tokio::try_join!(Cluster::start(&scratch, options), Mosquitto::start(&scratch, &[]))?;
        let regions = match plan {
            Some(plan) => {
                cluster.hand_over().await?;
                let regions = Regions::start(scratch.path(), &mut cluster, plan).await?;
                regions.whole(READY).await?;
                Some(regions)
            }
            None => None,
        };
        let launch = Launch::new("mqtt-consumer").envs(cluster.environment()).envs(broker.environment());
        let mut consumer = launch.start(scratch.path()).await?;
        consumer.ready(READY).await?;
        let ledger = scratch.path().join("ledger.json").display().to_string();
        let simulator = Launch::new("device-simulator")
            .envs(broker.environment())
            .set("device_simulator.ledger_every", "1s")
            .args(["--rate".to_owned(), rate.to_string(), "--ledger".to_owned(), ledger])
            .start(scratch.path())
            .await?;
        let commits = Commits::watch(consumer.port());
        let stage = Self { commits, simulator, consumer, regions, cluster, _broker: broker, scratch };
        stage.commits.after(Instant::now(), 20, READY).await?;
        Ok(stage)
    }

    /// # Errors
    /// When the nodes have no agents.
    pub fn regions(&mut self) -> anyhow::Result<&mut Regions> {
        self.regions.as_mut().context("a stage with agents")
    }

    /// Where the servers and programs keep their files.
    #[must_use]
    pub fn dir(&self) -> &std::path::Path {
        self.scratch.path()
    }

    /// What the broker has acknowledged, as the simulator last wrote it down.
    ///
    /// # Errors
    /// When there is no ledger yet.
    pub fn ledger(&self) -> anyhow::Result<Ledger> {
        let file = std::fs::File::open(self.scratch.path().join("ledger.json")).context("open the ledger")?;
        serde_json::from_reader(std::io::BufReader::new(file)).context("read the ledger")
    }

    /// Holds a ledger against the tables of every node that `wanted` names.
    ///
    /// # Errors
    /// When a node cannot be read.
    pub async fn compare(&self, ledger: &Ledger, wanted: &[&str]) -> anyhow::Result<Report> {
        let mut findings = Vec::new();
        for node in self.cluster.nodes.iter().filter(|node| wanted.contains(&node.name())) {
            let mut db = node.connect(Role::Owner).await?;
            let stored = stored::read(&mut db, ledger, Scope::Everything).await.context("read the tables")?;
            findings.push(compare(node.name(), ledger, &stored));
        }
        Ok(Report::new(ledger, findings))
    }

    /// Stops the devices, waits until what the broker holds is stored, and compares every device on every node; without
    /// agents on the primary alone.
    ///
    /// # Errors
    /// When something does not end, or the nodes do not become whole.
    pub async fn finish(&mut self) -> anyhow::Result<Report> {
        self.simulator.terminate(GRACE).await?;
        let ledger = self.ledger()?;
        if ledger.readings() == 0 {
            bail!("the broker acknowledged nothing: there is nothing to check");
        }
        self.drained(&ledger).await?;
        self.consumer.terminate(GRACE).await?;
        if self.regions.is_none() {
            return self.compare(&ledger, &[self.cluster.primary().name()]).await;
        }
        self.settle().await?;
        self.compare(&ledger, &["region1", "region2"]).await
    }

    /// Waits until both nodes have everything.
    ///
    /// # Errors
    /// When they do not become whole within two minutes.
    pub async fn settle(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + REPLAY;
        loop {
            let region = self.regions()?.whole(REPLAY).await?.current_region;
            self.cluster.led_by(&region)?;
            // A node that was gone for a moment may look whole until that is noticed: then another leads after all.
            match self.cluster.wait_replayed(REPLAY).await {
                Err(_) if Instant::now() < deadline => tokio::time::sleep(PAUSE).await,
                outcome => return outcome,
            }
        }
    }

    async fn drained(&mut self, ledger: &Ledger) -> anyhow::Result<()> {
        let wanted = i64::try_from(ledger.readings()).unwrap_or(i64::MAX);
        let deadline = Instant::now() + DRAIN;
        let (mut progress, mut last) = (Instant::now(), 0);
        loop {
            let metrics = self.consumer.metrics().await.unwrap_or_default();
            let waiting = metrics.count("ingest_rows_in_flight") + metrics.count("ingest_queue_messages");
            let received = metrics.count("ingest_received_total");
            if received != last || waiting > 0 {
                (last, progress) = (received, Instant::now());
            } else if let Ok(db) = self.cluster.connect(Role::Owner).await
                && let Ok(row) = db.query_one("SELECT count(*) FROM device_telemetry", &[]).await
                && (row.get::<_, i64>(0) >= wanted || progress.elapsed() > QUIET)
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the consumer has not drained the broker within {DRAIN:?}");
            }
            if let Some(regions) = &self.regions
                && let Ok(status) = regions.status().await
            {
                self.cluster.led_by(&status.current_region)?;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// When the consumer's committed rows were seen to grow.
#[derive(Debug)]
pub struct Commits {
    seen: Arc<Mutex<Vec<Instant>>>,
    _watch: JoinSet<()>,
}

impl Commits {
    fn watch(port: u16) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut watch = JoinSet::new();
        let noted = seen.clone();
        watch.spawn(async move {
            let mut last = 0;
            loop {
                if let Ok((200, body)) = http::get(port, "/metrics").await
                    && let Ok(metrics) = Metrics::parse(&body)
                {
                    let rows = metrics.count("ingest_rows_committed_total");
                    if rows != last {
                        last = rows;
                        noted.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                    }
                }
                tokio::time::sleep(LOOK).await;
            }
        });
        Self { seen, _watch: watch }
    }

    /// Waits until commits were seen so many times after `since`.
    ///
    /// # Errors
    /// When they are not within `limit`.
    pub async fn after(&self, since: Instant, wanted: usize, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = {
                let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.iter().rev().take_while(|at| **at > since).count()
            };
            if seen >= wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the consumer committed {seen} times, not {wanted}, within {limit:?}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The longest time between two commits, of those that ended after `since`.
    #[must_use]
    pub fn gap_since(&self, since: Instant) -> Duration {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = seen.iter().zip(seen.iter().skip(1));
        pairs.filter(|(_, later)| **later > since).map(|(a, b)| *b - *a).max().unwrap_or_default()
    }
}
