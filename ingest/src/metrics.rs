//! What ingest exports. Conservation: `received = committed + duplicates + dead letters + in flight`, in rows;
//! a residue is a bug.

use prometheus::core::Collector;
use prometheus::{Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts};
use service::metrics::Registry;

use crate::census::Readings;
use crate::dead_letter::Reason;

/// All series of one consumer.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub messages: IntCounter,
    pub rows_received: IntCounter,
    pub readings: Readings,
    pub rows_committed: IntCounter,
    pub duplicates: IntCounter,
    pub dead_letters: IntCounterVec,
    pub rows_in_flight: IntGauge,
    pub acknowledged: IntCounter,
    pub batches: IntCounterVec,
    pub batch_rows: Histogram,
    pub stage: HistogramVec,
    pub end_to_end: Histogram,
    pub retries: IntCounter,
    pub unknown_errors: IntCounter,
    pub merges: IntCounter,
    pub isolations: IntCounter,
    /// Of the one elected process; the others say 0.
    pub partitions_ahead: IntGauge,
    pub upkeep_succeeded: Gauge,
    pub upkeep_failures: IntCounter,
}

/// From half a millisecond to five minutes: what is slower than that is an outage, not a latency.
const LATENCY_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125,
    0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0,
];

impl Metrics {
    /// Registers every series.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            messages: counter(registry, "ingest_received_total", "Messages taken from the broker")?,
            rows_received: counter(
                registry,
                "ingest_rows_received_total",
                "Readings found in messages, refused ones included",
            )?,
            readings: Readings::new(registry)?,
            rows_committed: counter(registry, "ingest_rows_committed_total", "New rows committed")?,
            duplicates: counter(registry, "ingest_duplicates_total", "Readings that were stored already")?,
            dead_letters: register(
                registry,
                IntCounterVec::new(
                    Opts::new("ingest_dead_letters_total", "Readings or messages committed as dead letters"),
                    &["reason"],
                )?,
            )?,
            rows_in_flight: register(
                registry,
                IntGauge::new("ingest_rows_in_flight", "Readings decoded and not yet committed")?,
            )?,
            acknowledged: counter(
                registry,
                "ingest_acknowledged_total",
                "Messages acknowledged to the broker",
            )?,
            batches: register(
                registry,
                IntCounterVec::new(
                    Opts::new("ingest_batches_total", "Batches by what closed them"),
                    &["closed_by"],
                )?,
            )?,
            batch_rows: register(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new("ingest_batch_rows", "Readings in a batch").buckets(vec![
                        1.0, 10.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2000.0, 3000.0, 5000.0, 7500.0,
                        10000.0, 20000.0,
                    ]),
                )?,
            )?,
            stage: register(
                registry,
                HistogramVec::new(
                    HistogramOpts::new("ingest_stage_seconds", "Time of a batch in each stage")
                        .buckets(LATENCY_BUCKETS.to_vec()),
                    &["stage"],
                )?,
            )?,
            end_to_end: register(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "ingest_end_to_end_seconds",
                        "From a reading's timestamp to its commit",
                    )
                    .buckets(LATENCY_BUCKETS.to_vec()),
                )?,
            )?,
            retries: counter(
                registry,
                "ingest_write_retries_total",
                "Batches tried again after an error of the server or network",
            )?,
            unknown_errors: counter(
                registry,
                "ingest_unknown_errors_total",
                "Retries for an error nobody has classified; raise an alarm",
            )?,
            merges: counter(
                registry,
                "ingest_merges_total",
                "Batches that took the merge path because some rows were stored already",
            )?,
            isolations: counter(
                registry,
                "ingest_isolations_total",
                "Batches in which rows refused by the database were isolated",
            )?,
            partitions_ahead: register(
                registry,
                IntGauge::new(
                    "ingest_partitions_ahead",
                    "Partitions whose time has not begun; 0 unless elected to the upkeep, so take the maximum",
                )?,
            )?,
            upkeep_succeeded: register(
                registry,
                Gauge::new(
                    "ingest_upkeep_last_success_timestamp_seconds",
                    "When this process last finished the upkeep of the partitions, seconds since 1970; 0: never elected",
                )?,
            )?,
            upkeep_failures: counter(
                registry,
                "ingest_upkeep_failures_total",
                "Tries to prepare the tables or to keep the partitions that failed and are repeated",
            )?,
        };
        for reason in Reason::ALL {
            metrics.dead_letters.with_label_values(&[reason.as_str()]);
        }
        Ok(metrics)
    }
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    register(registry, IntCounter::new(name, help)?)
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
