//! Looks at everything four times a second and remembers the worst.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use playground::metrics::{Histogram, Metrics};
use playground::postgres::Role;
use playground::procfs::{self, Snapshot};
use tokio::time::{Interval, MissedTickBehavior, interval};
use wire::ledger::Ledger;

use super::stage::{READY, Stage};
use super::{OutageArgs, Outcome, Scenario};
use crate::verify::stored::{self, Scope};
use crate::verify::{Report, compare};

const EVERY: Duration = Duration::from_millis(250);
/// Readings that are committed are on average younger than this: nothing waits in the broker any more.
const LIVE: f64 = 1.0;
/// Longest wait until it has caught up.
const CATCH_UP: Duration = Duration::from_secs(900);
/// The simulator waits for acknowledgements, the consumer commits what it holds.
const GRACE: Duration = Duration::from_secs(120);
const REPLAY: Duration = Duration::from_secs(120);
/// Nothing waits and nothing comes for this long: what has not come will not come.
const QUIET: Duration = Duration::from_secs(15);
/// Longest wait for what the broker still holds when the devices have stopped.
const DRAIN: Duration = Duration::from_secs(600);

/// One look. Counts go on over restarts of the consumer.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// Messages the broker acknowledged to the devices.
    accepted: u64,
    pub(super) received: u64,
    /// Rows and dead letters.
    settled: u64,
    pub(super) rows_in_flight: u64,
    queue_messages: u64,
    /// Mean age of what was committed since the look before; `None` when nothing was.
    age: Option<f64>,
}

impl Sample {
    pub(super) fn waiting(&self) -> u64 {
        self.rows_in_flight + self.queue_messages
    }
}

/// The worst of each kind since the beginning.
#[derive(Debug, Clone, Default)]
pub(super) struct Worst {
    pub(super) rss_bytes: u64,
    pub(super) broker_rss_bytes: u64,
    pub(super) queue_messages: u64,
    pub(super) queue_messages_bound: u64,
    pub(super) queue_bytes: u64,
    pub(super) queue_bytes_bound: u64,
    pub(super) oldest_unacknowledged_seconds: f64,
    pub(super) backlog: u64,
    /// Looks at which the consumer answered and was not connected to the broker.
    pub(super) unconnected: u64,
    pub(super) reconnects: u64,
}

/// From the moment the part was back until readings arrived as young as before.
#[derive(Debug, Clone)]
pub(super) struct CatchUp {
    pub(super) after_seconds: f64,
    /// Rows per second meanwhile, from the first commit on; `None` when nothing was left to catch up.
    pub(super) per_second: Option<f64>,
    /// Cores that each process used meanwhile.
    pub(super) cores: BTreeMap<String, f64>,
}

#[derive(Debug, Clone)]
struct Moment {
    at: Instant,
    sample: Sample,
    cpu: BTreeMap<&'static str, f64>,
}

pub(super) struct Watch {
    ticks: Interval,
    last: Metrics,
    /// What consumers counted that run no more.
    ended: Metrics,
    now: Sample,
    warm: Option<(Instant, u64)>,
    live_rate: f64,
    mended: Option<Instant>,
    catch_up: Option<CatchUp>,
    pub(super) worst: Worst,
    retries: u64,
    duplicates: u64,
    consumer_pid: Option<i32>,
}

impl Watch {
    pub(super) async fn new(stage: &Stage) -> anyhow::Result<Self> {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            ticks,
            last: stage.consumer.metrics().await?,
            ended: Metrics::default(),
            now: Sample::default(),
            warm: None,
            live_rate: 0.0,
            mended: None,
            catch_up: None,
            worst: Worst::default(),
            retries: 0,
            duplicates: 0,
            consumer_pid: stage.consumer.pid(),
        })
    }

    /// The next look.
    pub(super) async fn look(&mut self, stage: &mut Stage) -> Sample {
        self.ticks.tick().await;
        if let Ok(metrics) = stage.simulator.metrics().await {
            self.now.accepted = metrics.count("device_simulator_acknowledged_total");
        }
        if let Some(pid) = stage.broker.pid() {
            self.worst.broker_rss_bytes = self.worst.broker_rss_bytes.max(procfs::peak_rss_bytes(pid));
        }
        self.now.age = None;
        let Ok(metrics) = stage.consumer.metrics().await else { return self.now.clone() };
        let pid = stage.consumer.pid();
        if pid != self.consumer_pid {
            self.consumer_pid = pid;
            self.ended = self.ended.plus(&self.last);
            self.last = Metrics::default();
        }
        let total = |name: &str| self.ended.count(name) + metrics.count(name);
        self.now.received = total("ingest_received_total");
        self.now.settled = total("ingest_rows_committed_total") + total("ingest_dead_letters_total");
        self.retries = total("ingest_write_retries_total");
        self.duplicates = total("ingest_duplicates_total");
        self.now.rows_in_flight = metrics.count("ingest_rows_in_flight");
        self.now.queue_messages = metrics.count("ingest_queue_messages");
        let ages: Histogram = metrics.histogram("ingest_end_to_end_seconds");
        self.now.age = ages.since(&self.last.histogram("ingest_end_to_end_seconds")).mean();
        let worst = &mut self.worst;
        worst.reconnects = self.ended.count("mqtt_reconnects_total") + metrics.count("mqtt_reconnects_total");
        worst.unconnected += u64::from(metrics.count("mqtt_connected") == 0);
        worst.queue_messages = worst.queue_messages.max(self.now.queue_messages);
        worst.queue_bytes = worst.queue_bytes.max(metrics.count("ingest_queue_bytes"));
        worst.queue_messages_bound = metrics.count("ingest_queue_max_messages");
        worst.queue_bytes_bound = metrics.count("ingest_queue_max_bytes");
        worst.oldest_unacknowledged_seconds =
            worst.oldest_unacknowledged_seconds.max(metrics.sum("ingest_oldest_unacknowledged_seconds"));
        worst.backlog = worst.backlog.max(self.now.accepted.saturating_sub(self.now.settled));
        if let Some(pid) = pid {
            worst.rss_bytes = worst.rss_bytes.max(procfs::peak_rss_bytes(pid));
        }
        self.last = metrics;
        self.now.clone()
    }

    /// Stops the devices, waits until what the broker holds is stored, and compares every device on every node.
    pub(super) async fn finish(&mut self, stage: &mut Stage) -> anyhow::Result<Report> {
        stage.simulator.terminate(GRACE).await?;
        let file =
            std::fs::File::open(stage.scratch.path().join("ledger.json")).context("open the ledger")?;
        let ledger: Ledger =
            serde_json::from_reader(std::io::BufReader::new(file)).context("read the ledger")?;
        if ledger.readings() == 0 {
            bail!("the broker acknowledged nothing: there is nothing to check");
        }
        self.drained(stage, &ledger).await?;
        stage.consumer.terminate(GRACE).await?;
        stage.cluster.wait_synchronous().await?;
        stage.cluster.wait_replayed(REPLAY).await?;
        let mut findings = Vec::new();
        for node in &stage.cluster.nodes {
            let mut db = node.connect(Role::Owner).await?;
            let stored =
                stored::read(&mut db, &ledger, Scope::Everything).await.context("read the tables")?;
            findings.push(compare(node.name(), &ledger, &stored));
        }
        Ok(Report::new(&ledger, findings))
    }

    /// The tables hold as much as the ledger, or nothing comes any more (the comparison says what is missing).
    async fn drained(&mut self, stage: &mut Stage, ledger: &Ledger) -> anyhow::Result<()> {
        let wanted = i64::try_from(ledger.readings()).unwrap_or(i64::MAX);
        let deadline = Instant::now() + DRAIN;
        let mut progress = Instant::now();
        let mut last = 0;
        loop {
            let sample = self.look(stage).await;
            if sample.received != last || sample.waiting() > 0 {
                last = sample.received;
                progress = Instant::now();
            } else {
                let db = stage.cluster.connect(Role::Owner).await?;
                let sql = "SELECT count(*) FROM device_telemetry";
                let rows: i64 = db.query_one(sql, &[]).await.context("count the rows")?.get(0);
                if rows >= wanted || progress.elapsed() > QUIET {
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                bail!("the consumer has not drained the broker within {DRAIN:?}");
            }
        }
    }

    pub(super) async fn until_flowing(&mut self, stage: &mut Stage) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY;
        while self.look(stage).await.settled == 0 {
            if let Some(status) = stage.simulator.ended() {
                let tail = playground::child::tail(stage.simulator.log(), 15);
                bail!("device-simulator ended with {status}{tail}");
            }
            if Instant::now() > deadline {
                bail!(
                    "no row is committed after {READY:?}{}",
                    playground::child::tail(stage.consumer.log(), 15)
                );
            }
        }
        self.warm = Some((Instant::now(), self.now.accepted));
        Ok(())
    }

    /// Goes on looking for so long.
    pub(super) async fn hold(&mut self, stage: &mut Stage, length: Duration) {
        let end = Instant::now() + length;
        while Instant::now() < end {
            self.look(stage).await;
        }
    }

    /// The warm-up is over: what the broker took a second is the live rate.
    pub(super) fn live(&mut self) {
        if let Some((since, accepted)) = self.warm {
            self.live_rate = (self.now.accepted - accepted) as f64 / since.elapsed().as_secs_f64();
        }
    }

    /// What was away is back.
    pub(super) fn mended(&mut self) {
        self.mended = Some(Instant::now());
    }

    /// Until readings arrive as young as before. What was caught up is measured from the first commit on.
    pub(super) async fn until_caught_up(&mut self, stage: &mut Stage) {
        let Some(mended) = self.mended else { return };
        let mut first: Option<Moment> = None;
        let before = self.now.settled;
        while mended.elapsed() < CATCH_UP {
            let sample = self.look(stage).await;
            if first.is_none() && sample.settled > before {
                first = Some(Moment { at: Instant::now(), sample: sample.clone(), cpu: cpu(stage) });
            }
            // Nothing may have gone through yet, and then nothing is old either.
            if let Some(first) = first.as_ref().filter(|_| sample.age.is_some_and(|age| age < LIVE)) {
                let seconds = first.at.elapsed().as_secs_f64();
                let rows = (sample.settled - first.sample.settled) as f64;
                let cores = cpu(stage).into_iter().map(|(name, used)| {
                    let before = first.cpu.get(name).copied().unwrap_or(0.0);
                    (name.to_owned(), (used - before) / seconds.max(EVERY.as_secs_f64()))
                });
                self.catch_up = Some(CatchUp {
                    after_seconds: mended.elapsed().as_secs_f64(),
                    // Over at the first look: there was nothing to catch up.
                    per_second: (seconds > EVERY.as_secs_f64()).then(|| rows / seconds),
                    cores: cores.collect(),
                });
                return;
            }
        }
    }

    pub(super) fn outcome(&self, scenario: Scenario, args: &OutageArgs, report: &Report) -> Outcome {
        Outcome {
            name: scenario.name().to_owned(),
            outage_seconds: args.outage.as_secs_f64(),
            live_rate: self.live_rate,
            acknowledged: report.acknowledged,
            verdict: report.verdict(),
            exact: report.holds() && report.nodes.len() == 2,
            must_keep_broker: scenario.keeps_the_broker(),
            worst: self.worst.clone(),
            catch_up: self.catch_up.clone(),
            retries: self.retries,
            duplicates: self.duplicates,
        }
    }
}

fn cpu(stage: &Stage) -> BTreeMap<&'static str, f64> {
    let snapshot = Snapshot::take();
    let [primary, standby] = [stage.cluster.primary().pid(), stage.cluster.standby().pid()];
    [
        ("device-simulator", stage.simulator.pid()),
        ("mosquitto", stage.broker.pid()),
        ("mqtt-consumer", stage.consumer.pid()),
        ("primary", primary),
        ("standby", standby),
    ]
    .into_iter()
    .filter_map(|(name, pid)| Some((name, snapshot.tree_cpu_seconds(pid?))))
    .collect()
}
