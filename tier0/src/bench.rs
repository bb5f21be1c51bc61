//! `tier0 bench`: how fast the whole pipeline is, beside the limits of this machine, in one run.
//!
//! Every row is measured with the same publisher and the same payloads, in turns, several times; the medians count.
//! Absolute figures move with the machine, ratios between rows of one run do not. Claims nothing it did not measure.

mod database;
pub mod failover;
mod floor;
pub mod growth;
mod insert;
mod pipeline;
mod report;
pub mod sessions;
mod subscriber;
mod usual;

use std::path::PathBuf;

use anyhow::Context;

use crate::terminal::say;
use floor::{Floor, Load};
use report::Samples;

/// Options of `bench`.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArgs {
    /// Number of measurements per row; the median is reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub rounds: u32,
    /// Messages per measurement
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    pub messages: u64,
    /// Only these rows; may be repeated [default: all]
    #[arg(long, value_name = "ROW")]
    pub only: Vec<Row>,
    /// File for the medians, as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    pub json: PathBuf,
    /// Extra settings for mqtt-consumer; may be repeated [example: --set ingest.max_rows=10000]
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Row {
    BrokerQos0,
    BrokerQos1,
    Database,
    OursQos0,
    OursQos1,
    Baseline,
    /// The same way in Rust
    BaselineRust,
    Arrays,
    /// Ours at QoS 1 with 30 % of the messages repeated
    Repeats,
    /// Ours at QoS 1 with one row in 10,000 that only the database refuses
    Poison,
}

impl Row {
    const ALL: [Self; 10] = [
        Self::BrokerQos0,
        Self::BrokerQos1,
        Self::Database,
        Self::OursQos0,
        Self::OursQos1,
        Self::Baseline,
        Self::BaselineRust,
        Self::Arrays,
        Self::Repeats,
        Self::Poison,
    ];

    /// The key in the JSON document.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::BrokerQos0 => "broker_qos0",
            Self::BrokerQos1 => "broker_qos1",
            Self::Database => "database",
            Self::OursQos0 => "ours_qos0",
            Self::OursQos1 => "ours_qos1",
            Self::Baseline => "baseline",
            Self::BaselineRust => "baseline_rust",
            Self::Arrays => "arrays",
            Self::Repeats => "repeats",
            Self::Poison => "poison",
        }
    }
}

/// One measurement: messages or rows per second, and what one should know about it.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    pub per_second: f64,
    pub note: String,
}

/// Runs the benchmark and prints the table.
///
/// # Errors
/// When a server or process fails, or when a ledger does not match the tables.
pub async fn run(args: BenchArgs) -> anyhow::Result<()> {
    let rows: Vec<Row> = if args.only.is_empty() { Row::ALL.to_vec() } else { args.only.clone() };
    let mut floor = Floor::new(args.set.clone()).await?;
    let mut samples = Samples::default();
    for round in 1..=args.rounds {
        for row in &rows {
            let measured = measure(&mut floor, *row, args.messages)
                .await
                .with_context(|| format!("measure {}", row.key()))?;
            say(format_args!(
                "round {round}  {:<12} {:>9.0}/s  {}",
                row.key(),
                measured.per_second,
                measured.note
            ));
            samples.add(*row, measured.per_second);
        }
    }
    floor.end().await?;
    let table = samples.table();
    say(&table);
    if let Some(parent) = args.json.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    std::fs::write(&args.json, serde_json::to_string_pretty(&samples.json())?)
        .with_context(|| format!("write {}", args.json.display()))
}

async fn measure(floor: &mut Floor, row: Row, messages: u64) -> anyhow::Result<Measured> {
    floor.clean().await?;
    match row {
        Row::BrokerQos0 => subscriber::measure(floor, 0, messages).await,
        Row::BrokerQos1 => subscriber::measure(floor, 1, messages).await,
        Row::Database => database::measure(floor, messages).await,
        Row::OursQos0 => pipeline::measure(floor, Load::singles(0, messages)).await,
        Row::OursQos1 => pipeline::measure(floor, Load::singles(1, messages)).await,
        // A twentieth of the messages: at a tenth of the speed or less that takes as long.
        Row::Baseline => usual::measure(floor, (messages / 20).max(1_000)).await,
        Row::BaselineRust => insert::measure(floor, (messages / 20).max(1_000)).await,
        Row::Arrays => pipeline::measure(floor, Load::arrays((messages / 50).max(100), 100)).await,
        Row::Repeats => {
            pipeline::measure(floor, Load { trouble: Some("duplicate=0.3"), ..Load::singles(1, messages) })
                .await
        }
        Row::Poison => {
            pipeline::measure(
                floor,
                Load { trouble: Some("huge_number=0.0001"), ..Load::singles(1, messages) },
            )
            .await
        }
    }
}
