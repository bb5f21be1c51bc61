//! One second of the running system in numbers.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use tokio_postgres::Client;

use super::regions::RegionsSeen;
use super::stack::Stack;
use playground::metrics::{Histogram, Metrics};
use playground::postgres::Db;
use playground::procfs;

/// Samples kept for the charts: two minutes.
const KEPT: usize = 120;

/// Rates are per second since the sample before; totals since the start of the run.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// Since the first message was sent.
    pub seconds: f64,
    pub sent_rate: f64,
    pub received_rate: f64,
    pub committed_rate: f64,
    pub acknowledged: u64,
    pub received: u64,
    pub committed: u64,
    pub duplicates: u64,
    pub dead_letters: BTreeMap<String, u64>,
    pub rows_in_flight: u64,
    pub queue_messages: u64,
    pub publisher_in_flight: u64,
    /// How far the simulator is behind its own schedule.
    pub behind_seconds: f64,
    pub p50: Option<f64>,
    pub p95: Option<f64>,
    pub p99: Option<f64>,
    pub batch_rows: Option<f64>,
    pub retries: u64,
    /// Written by the primary and not yet flushed, or not yet replayed, by the standby. `None`: not attached.
    pub flush_lag_bytes: Option<u64>,
    pub replay_lag_bytes: Option<u64>,
    pub synchronous: bool,
    /// Messages of user activity per second. `None`: nobody consumes them.
    pub session_rate: Option<f64>,
    /// `None`: one region alone, or the orchestrator does not answer.
    pub regions: Option<RegionsSeen>,
    pub processes: Vec<Usage>,
}

/// What a process used: cores since the sample before, memory now.
#[derive(Debug, Clone, Default)]
pub struct Usage {
    pub name: String,
    pub port: u16,
    pub cores: f64,
    pub rss_bytes: u64,
}

/// Takes samples and remembers what the next one and the summary need.
#[derive(Debug)]
pub(super) struct Sampler {
    started: Instant,
    began: Instant,
    /// Counters of the consumer before the first message of this run.
    before: Metrics,
    last: Option<(Instant, Metrics, u64, BTreeMap<String, f64>)>,
    history: VecDeque<Sample>,
    first_row: Option<f64>,
    admin: Option<Db>,
    /// The newest scrape of the consumer that succeeded.
    newest: Metrics,
    cpu_seconds: BTreeMap<String, f64>,
    consumer_rss_max: u64,
}

impl Sampler {
    pub(super) fn new(started: Instant, began: Instant, before: Option<Metrics>) -> Self {
        let before = before.unwrap_or_default();
        Self {
            started,
            began,
            newest: before.clone(),
            before,
            last: None,
            history: VecDeque::new(),
            first_row: None,
            admin: None,
            cpu_seconds: BTreeMap::new(),
            consumer_rss_max: 0,
        }
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    pub(super) fn history(&self) -> &VecDeque<Sample> {
        &self.history
    }

    /// From the start of the command to the first committed row of this run.
    pub(super) fn start_seconds(&self) -> Option<f64> {
        self.first_row
    }

    /// Notes the first committed row; true when this is it.
    pub(super) fn saw_rows(&mut self, metrics: &Metrics) -> bool {
        let seen = self.first_row.is_none() && self.since_start(metrics, "ingest_rows_committed_total") > 0;
        if seen {
            self.first_row = Some(self.began.elapsed().as_secs_f64());
        }
        seen
    }

    /// A counter of the consumer since the first message of this run.
    pub(super) fn since_start(&self, metrics: &Metrics, name: &str) -> u64 {
        metrics.count(name).saturating_sub(self.before.count(name))
    }

    pub(super) fn dead_letters(&self, metrics: &Metrics) -> BTreeMap<String, u64> {
        let before = self.before.by_label("ingest_dead_letters_total", "reason");
        let mut now = metrics.by_label("ingest_dead_letters_total", "reason");
        for (reason, count) in &mut now {
            *count = count.saturating_sub(before.get(reason).copied().unwrap_or(0));
        }
        now.retain(|_, count| *count > 0);
        now
    }

    /// What is worth a line of its own since the sample before: the first dead letter of each reason.
    pub(super) fn events(&self) -> Vec<String> {
        let mut newest = self.history.iter().rev();
        let Some(now) = newest.next() else { return Vec::new() };
        let before = newest.next();
        let is_new = |reason: &String| before.is_none_or(|before| !before.dead_letters.contains_key(reason));
        let reasons = now.dead_letters.keys().filter(|reason| is_new(reason));
        reasons
            .map(|reason| format!("first dead letter with reason {reason}: table dead_letters has it"))
            .collect()
    }

    /// End-to-end latencies of the whole run.
    pub(super) fn latencies(&self) -> Histogram {
        let name = "ingest_end_to_end_seconds";
        self.newest.histogram(name).since(&self.before.histogram(name))
    }

    pub(super) fn newest(&self) -> &Metrics {
        &self.newest
    }

    pub(super) fn cpu_seconds(&self) -> &BTreeMap<String, f64> {
        &self.cpu_seconds
    }

    pub(super) fn consumer_rss_max(&self) -> u64 {
        self.consumer_rss_max
    }

    /// Scrapes the consumer and remembers it; the old numbers when it does not answer.
    pub(super) async fn scrape(&mut self, stack: &Stack) -> Metrics {
        if let Some(metrics) = stack.consumer_metrics().await {
            self.saw_rows(&metrics);
            self.newest = metrics;
        }
        if let Some(pid) = stack.consumer.as_ref().and_then(|consumer| consumer.pid()) {
            self.consumer_rss_max = self.consumer_rss_max.max(procfs::peak_rss_bytes(pid));
        }
        self.newest.clone()
    }

    pub(super) async fn take(&mut self, stack: &mut Stack) -> Sample {
        let now = Instant::now();
        let (metrics, simulator, lag) = (
            self.scrape(stack).await,
            stack.simulator_metrics().await.unwrap_or_default(),
            self.lag(stack).await,
        );
        let session_rate = match &mut stack.sessions {
            Some(sessions) => sessions.rate().await,
            None => None,
        };
        let sent = simulator.count("device_simulator_sent_total");
        let (since, before, sent_before, cpu_before) = self
            .last
            .take()
            .unwrap_or_else(|| (self.started, self.before.clone(), 0, self.cpu_seconds.clone()));
        let elapsed = now.duration_since(since).as_secs_f64().max(0.001);
        let rate = |name: &str| (metrics.sum(name) - before.sum(name)).max(0.0) / elapsed;
        let delta = |name: &str| metrics.histogram(name).since(&before.histogram(name));
        let latencies = delta("ingest_end_to_end_seconds");
        #[allow(clippy::cast_precision_loss, reason = "a rate for the eye")]
        let sent_rate = sent.saturating_sub(sent_before) as f64 / elapsed;
        let processes = self.usage(stack, &cpu_before, elapsed);
        let sample = Sample {
            seconds: now.duration_since(self.started).as_secs_f64(),
            sent_rate,
            received_rate: rate("ingest_received_total"),
            committed_rate: rate("ingest_rows_committed_total"),
            acknowledged: simulator.count("device_simulator_acknowledged_total"),
            received: self.since_start(&metrics, "ingest_received_total"),
            committed: self.since_start(&metrics, "ingest_rows_committed_total"),
            duplicates: self.since_start(&metrics, "ingest_duplicates_total"),
            dead_letters: self.dead_letters(&metrics),
            rows_in_flight: metrics.count("ingest_rows_in_flight"),
            queue_messages: metrics.count("ingest_queue_messages"),
            publisher_in_flight: simulator.count("device_simulator_in_flight"),
            behind_seconds: simulator.sum("device_simulator_behind_seconds"),
            p50: latencies.quantile(0.5),
            p95: latencies.quantile(0.95),
            p99: latencies.quantile(0.99),
            batch_rows: delta("ingest_batch_rows").mean(),
            retries: self.since_start(&metrics, "ingest_write_retries_total"),
            flush_lag_bytes: lag.map(|lag| lag.0),
            replay_lag_bytes: lag.map(|lag| lag.1),
            synchronous: lag.is_some_and(|lag| lag.2),
            session_rate,
            regions: stack.seen.clone(),
            processes,
        };
        self.last = Some((now, metrics, sent, self.cpu_seconds.clone()));
        self.history.push_back(sample.clone());
        if self.history.len() > KEPT {
            self.history.pop_front();
        }
        sample
    }

    /// Reads the processor time of everything that runs, for the summary too.
    fn usage(&mut self, stack: &Stack, before: &BTreeMap<String, f64>, elapsed: f64) -> Vec<Usage> {
        let snapshot = procfs::Snapshot::take();
        let mut usage = Vec::new();
        let processes = stack.processes();
        // An agent is the parent of its Postgres, which has a line of its own.
        let listed: Vec<i32> = processes.iter().map(|process| process.pid).collect();
        for process in processes {
            let cpu = snapshot.tree_cpu_seconds_but(process.pid, &listed);
            let used = before.get(&process.name).map_or(0.0, |before| (cpu - before).max(0.0));
            usage.push(Usage {
                name: process.name.clone(),
                port: process.port,
                cores: used / elapsed,
                rss_bytes: procfs::stat(process.pid).map_or(0, |stat| stat.rss_bytes),
            });
            self.cpu_seconds.insert(process.name, cpu);
        }
        usage
    }

    /// Bytes the standby has not flushed and not replayed, and whether it is synchronous.
    async fn lag(&mut self, stack: &Stack) -> Option<(u64, u64, bool)> {
        if self.admin.as_ref().is_none_or(|db| db.is_closed()) {
            self.admin = stack.cluster.primary().admin().await.ok();
        }
        let lag = match &self.admin {
            Some(db) => ask_lag(db).await,
            None => None,
        };
        if lag.is_none() {
            self.admin = None;
        }
        lag
    }
}

async fn ask_lag(db: &Client) -> Option<(u64, u64, bool)> {
    let sql = "SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn))::bigint, \
               max(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn))::bigint, bool_or(sync_state = 'sync') \
               FROM pg_stat_replication WHERE state = 'streaming'";
    let query = tokio::time::timeout(std::time::Duration::from_secs(1), db.query_one(sql, &[]));
    let row = query.await.ok()?.ok()?;
    let bytes =
        |column: usize| row.get::<_, Option<i64>>(column).and_then(|bytes| u64::try_from(bytes.max(0)).ok());
    Some((bytes(0)?, bytes(1)?, row.get::<_, Option<bool>>(2).unwrap_or(false)))
}
