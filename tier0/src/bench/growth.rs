//! `tier0 bench-growth`: how the rates hold as the table grows.
//!
//! Gateway arrays fill the table as fast as they are taken. After every step single readings follow, first as fast as
//! they are taken, then at a live rate, whose latency counts; and the look-ups of people on call are timed. Every
//! burst's ledger is held against both nodes. Nothing is pre-loaded: each row came through the broker.

mod chart;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;
use wire::ledger::Ledger;

use super::floor::{Floor, Load, PATIENCE, rate};
use crate::terminal::say;
use crate::verify::stored::{self, Scope, next_transaction};
use crate::verify::{Report, compare};
use playground::metrics::{Histogram, Metrics};
use playground::postgres::Role;
use playground::program::Program;

/// Readings of one array message.
const ARRAY: u16 = 100;
/// Bytes one row takes on one node with its indexes, measured and rounded up.
const BYTES_PER_ROW: u64 = 570;
/// WAL that both nodes keep beside it, twice what `max_wal_size` lets one keep, and room for the broker.
const WAL_BYTES: u64 = 19_000_000_000;
const LIVE_SECONDS: u64 = 10;
/// Look-ups of each kind a step times; the median counts.
const LOOKUPS: usize = 9;

/// Options of `bench-growth`.
#[derive(Debug, Clone, clap::Args)]
pub struct GrowthArgs {
    /// Number of rows at the end
    #[arg(long, default_value_t = 50_000_000, value_parser = clap::value_parser!(u64).range(10_000..=1_000_000_000))]
    pub rows: u64,
    /// Rows between two measurements of single readings and look-ups
    #[arg(long, default_value_t = 5_000_000, value_parser = clap::value_parser!(u64).range(10_000..=1_000_000_000))]
    pub step: u64,
    /// Single readings after each step, as fast as they are accepted
    #[arg(long, default_value_t = 300_000, value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    pub singles: u64,
    /// Single readings per second in the ten-second burst that measures latency
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub live: u32,
    /// File for the chart, as SVG
    #[arg(long, value_name = "FILE", default_value = "target/growth.svg")]
    pub chart: PathBuf,
    /// File for the figures, as JSON
    #[arg(long, value_name = "FILE", default_value = "target/growth.json")]
    pub json: PathBuf,
    /// Extra settings for mqtt-consumer; may be repeated [example: --set ingest.max_rows=10000]
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

/// What one step showed, with this many rows in the table at its end.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Step {
    pub(super) rows: u64,
    pub(super) arrays_rows_per_second: f64,
    pub(super) singles_per_second: f64,
    pub(super) live_p50_ms: Option<f64>,
    pub(super) live_p99_ms: Option<f64>,
    pub(super) newest_ms: f64,
    pub(super) hour_ms: f64,
    pub(super) table_bytes: u64,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:>11} rows  arrays {:>7.0}/s  singles {:>6.0}/s  live p50 {:>5.0} p99 {:>5.0} ms  newest {:>5.1} ms  \
             last hour {:>6.1} ms  {:>5.1} GB a node  exact",
            self.rows,
            self.arrays_rows_per_second,
            self.singles_per_second,
            self.live_p50_ms.unwrap_or(f64::NAN),
            self.live_p99_ms.unwrap_or(f64::NAN),
            self.newest_ms,
            self.hour_ms,
            self.table_bytes as f64 / 1e9,
        )
    }
}

/// What was sent in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    Arrays,
    Singles,
    Live,
}

/// One second of the run; latency is from a reading's timestamp to its commit.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Second {
    pub(super) seconds: f64,
    pub(super) rows: u64,
    pub(super) rows_per_second: f64,
    pub(super) p50_ms: Option<f64>,
    pub(super) p99_ms: Option<f64>,
    pub(super) phase: Phase,
}

/// Runs the growth and writes figures and chart.
///
/// # Errors
/// When the disk is too small for it, a server or process fails, or a ledger does not match the tables.
pub async fn run(args: GrowthArgs) -> anyhow::Result<()> {
    let mut floor = Floor::new(args.set.clone()).await?;
    let live = Load { rate: Some(args.live), ..Load::singles(1, u64::from(args.live) * LIVE_SECONDS) };
    let bursts = args.rows.div_ceil(args.step) * (args.singles + live.messages);
    room(&floor.path(""), WAL_BYTES + 2 * BYTES_PER_ROW * (args.rows + bursts))?;
    floor.clean().await?;
    floor.broker().await?;
    let mut growth =
        Growth { consumer: floor.consumer().await?, started: Instant::now(), rows: 0, seconds: Vec::new() };
    let mut steps: Vec<Step> = Vec::new();
    while growth.rows < args.rows {
        let readings = args.step.min(args.rows - growth.rows);
        let arrays = Load::arrays(readings.div_ceil(u64::from(ARRAY)), ARRAY);
        let arrays = growth.burst(&mut floor, Phase::Arrays, arrays).await.context("arrays")?;
        let singles = Load::singles(1, args.singles);
        let singles = growth.burst(&mut floor, Phase::Singles, singles).await.context("single readings")?;
        let live = growth.burst(&mut floor, Phase::Live, live).await.context("readings at the live rate")?;
        let ids = &live.ledger.devices;
        let devices = ids.keys().step_by(ids.len().div_ceil(LOOKUPS)).cloned().collect();
        let (newest_ms, hour_ms) = lookups(&floor, devices).await.context("look readings up")?;
        let step = Step {
            rows: growth.rows,
            arrays_rows_per_second: arrays.per_second,
            singles_per_second: singles.per_second,
            live_p50_ms: live.p50_ms,
            live_p99_ms: live.p99_ms,
            newest_ms,
            hour_ms,
            table_bytes: table_bytes(&floor).await?,
        };
        say(format_args!("{step}"));
        steps.push(step);
    }
    growth.consumer.terminate(PATIENCE).await?;
    floor.end().await?;
    write(
        &args.json,
        &serde_json::to_string_pretty(&serde_json::json!({ "steps": steps, "seconds": growth.seconds }))?,
    )?;
    write(&args.chart, &chart::growth(&growth.seconds, &steps)?)?;
    say(format_args!("chart: {}", args.chart.display()));
    Ok(())
}

struct Growth {
    consumer: Program,
    started: Instant,
    /// Committed so far.
    rows: u64,
    seconds: Vec<Second>,
}

/// What a burst showed.
struct Burst {
    per_second: f64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    ledger: Ledger,
}

impl Growth {
    /// Sends the load, waits for its rows and checks them on both nodes.
    async fn burst(&mut self, floor: &mut Floor, phase: Phase, load: Load) -> anyhow::Result<Burst> {
        let first_transaction = next_transaction(&*floor.cluster.connect(Role::Owner).await?).await?;
        let mut publisher = floor.publisher(load).await?;
        let latency = |metrics: &Metrics| metrics.histogram("ingest_end_to_end_seconds");
        let earlier = latency(&self.consumer.metrics().await?);
        let (before, started, consumer) = (self.rows, self.started, &mut self.consumer);
        let mut sampler = Sampler::new(started, before, phase);
        let (per_second, count) = rate(load.rows(), async || {
            let metrics = consumer.metrics().await?;
            let committed = metrics.count("ingest_rows_committed_total");
            sampler.see(committed, latency(&metrics));
            Ok(committed.saturating_sub(before))
        })
        .await?;
        let seen = latency(&self.consumer.metrics().await?).since(&earlier);
        self.rows += count;
        self.seconds.append(&mut sampler.seconds);
        let ledger = floor.ledger(&mut publisher).await?;
        floor.cluster.wait_replayed(PATIENCE).await?;
        let mut nodes = Vec::new();
        for node in &floor.cluster.nodes {
            let mut db = node.connect(Role::Owner).await?;
            let stored = stored::read(&mut db, &ledger, Scope::Run { first_transaction }).await?;
            nodes.push(compare(node.name(), &ledger, &stored));
        }
        let report = Report::new(&ledger, nodes);
        if !report.holds() {
            bail!("the ledger does not match the tables: {}", report.verdict());
        }
        let ms = |quantile| seen.quantile(quantile).map(|seconds| seconds * 1e3);
        Ok(Burst { per_second, p50_ms: ms(0.5), p99_ms: ms(0.99), ledger })
    }
}

/// Turns scrapes into seconds of the chart.
struct Sampler {
    started: Instant,
    before: u64,
    phase: Phase,
    last: Option<(Instant, u64, Histogram)>,
    seconds: Vec<Second>,
}

impl Sampler {
    fn new(started: Instant, before: u64, phase: Phase) -> Self {
        Self { started, before, phase, last: None, seconds: Vec::new() }
    }

    fn see(&mut self, committed: u64, latency: Histogram) {
        let now = Instant::now();
        let Some((at, rows, earlier)) = &self.last else {
            if committed > self.before {
                self.last = Some((now, committed, latency));
            }
            return;
        };
        let elapsed = (now - *at).as_secs_f64();
        if elapsed < 1.0 {
            return;
        }
        let seen = latency.since(earlier);
        self.seconds.push(Second {
            seconds: (now - self.started).as_secs_f64(),
            rows: committed,
            rows_per_second: committed.saturating_sub(*rows) as f64 / elapsed,
            p50_ms: seen.quantile(0.5).map(|s| s * 1e3),
            p99_ms: seen.quantile(0.99).map(|s| s * 1e3),
            phase: self.phase,
        });
        self.last = Some((now, committed, latency));
    }
}

/// Medians in milliseconds: the newest reading of a device, all readings of its last hour.
async fn lookups(floor: &Floor, devices: Vec<String>) -> anyhow::Result<(f64, f64)> {
    let db = floor.cluster.connect(Role::Owner).await?;
    let newest = db
        .prepare(
            "SELECT * FROM device_telemetry WHERE device_id = $1 AND timestamp_utc > now() - interval '1 hour' \
             ORDER BY timestamp_utc DESC LIMIT 1",
        )
        .await?;
    let hour = db
        .prepare(
            "SELECT * FROM device_telemetry WHERE device_id = $1 AND timestamp_utc > now() - interval '1 hour'",
        )
        .await?;
    let mut times: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for device in devices {
        for (statement, times) in [&newest, &hour].into_iter().zip(&mut times) {
            let started = Instant::now();
            let rows = db.query(statement, &[&device]).await?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
            anyhow::ensure!(!rows.is_empty(), "device {device} has no reading");
        }
    }
    let [newest, hour] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or_default()
    });
    Ok((newest, hour))
}

async fn table_bytes(floor: &Floor) -> anyhow::Result<u64> {
    let row = floor
        .cluster
        .connect(Role::Owner)
        .await?
        .query_one(
            "SELECT sum(pg_total_relation_size(relid))::bigint FROM pg_partition_tree('device_telemetry') WHERE isleaf",
            &[],
        )
        .await
        .context("ask for the table's size")?;
    Ok(u64::try_from(row.get::<_, i64>(0))?)
}

/// Better now than a full disk after ten minutes.
fn room(path: &Path, wanted: u64) -> anyhow::Result<()> {
    let disk = nix::sys::statvfs::statvfs(path)
        .with_context(|| format!("look at the disk of {}", path.display()))?;
    let free = disk.blocks_available() * disk.fragment_size();
    if free < wanted {
        bail!(
            "{} GB are free at {}, about {} GB are needed for both nodes: ask for fewer with --rows",
            free / 1_000_000_000,
            path.display(),
            wanted.div_ceil(1_000_000_000)
        );
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
