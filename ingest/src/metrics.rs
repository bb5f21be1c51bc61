//! What ingest exports. Conservation: `received = committed + duplicates + dead letters + in flight`, in rows;
//! a residue is a bug.

mod letters;

use prometheus::core::Collector;
use prometheus::{Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts};
use service::metrics::Registry;

use crate::audit::key::Key;
use crate::dead_letter::Reason;
use crate::site_counts::Readings;
use crate::tolerated::Tolerated;
pub use letters::LetterMetrics;

/// All series of one consumer.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub messages: IntCounter,
    pub rows_received: IntCounter,
    pub readings: Readings,
    pub rows_committed: IntCounter,
    pub duplicates: IntCounter,
    pub dead_letters: IntCounterVec,
    pub tolerated: IntCounterVec,
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
    pub joined: IntCounter,
    pub letters_suppressed: IntCounter,
    pub swallowed: IntCounter,
    pub splits: IntCounter,
    /// Batches held now.
    pub held_by_schema: IntGauge,
    /// Of the one elected process; the others say 0.
    pub partitions_ahead: IntGauge,
    pub partitions_overdue: Gauge,
    pub upkeep_succeeded: Gauge,
    pub upkeep_failures: IntCounter,
    pub clock_offset: Gauge,
    pub clock_uncertain: IntGauge,
    /// Of the one elected process; the others say 0.
    pub letters: LetterMetrics,
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
            messages: counter(registry, "ingest_received_total", "Messages received from the broker")?,
            rows_received: counter(
                registry,
                "ingest_rows_received_total",
                "Readings found in messages, including refused ones",
            )?,
            readings: Readings::new(registry)?,
            rows_committed: counter(registry, "ingest_rows_committed_total", "New rows committed")?,
            duplicates: counter(registry, "ingest_duplicates_total", "Readings that were already stored")?,
            dead_letters: register(
                registry,
                IntCounterVec::new(
                    Opts::new("ingest_dead_letters_total", "Readings or messages committed as dead letters"),
                    &["reason"],
                )?,
            )?,
            tolerated: register(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "ingest_tolerated_total",
                        "Readings accepted with a deviation from the message format, by deviation; empty: messages",
                    ),
                    &["what"],
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
                    Opts::new("ingest_batches_total", "Batches, by what closed them"),
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
                "Batches retried after an error of the server or network",
            )?,
            unknown_errors: counter(
                registry,
                "ingest_unknown_errors_total",
                "Retries because of an unclassified database error",
            )?,
            merges: counter(
                registry,
                "ingest_merges_total",
                "Batches that took the merge path because some rows were already stored",
            )?,
            isolations: counter(
                registry,
                "ingest_isolations_total",
                "Batches in which rows refused by the database were isolated",
            )?,
            joined: counter(
                registry,
                "ingest_rows_joined_total",
                "Readings whose metrics were joined into a stored row with the same device and timestamp",
            )?,
            letters_suppressed: counter(
                registry,
                "ingest_dead_letters_suppressed_total",
                "Refused readings without a dead letter because their device exceeded its allowance; its valid readings are stored",
            )?,
            swallowed: counter(
                registry,
                "ingest_swallowed_batches_total",
                "Batches of which the table stored fewer rows than it reported; the missing rows become dead letters",
            )?,
            splits: counter(
                registry,
                "ingest_split_batches_total",
                "Batches that failed repeatedly while the database accepted other work, and were split by message",
            )?,
            held_by_schema: register(
                registry,
                IntGauge::new(
                    "ingest_batches_held_by_schema",
                    "Held batches: the tables refuse rows that they accepted before",
                )?,
            )?,
            partitions_ahead: register(
                registry,
                IntGauge::new(
                    "ingest_partitions_ahead",
                    "Partitions whose time has not begun; 0 unless elected to the upkeep, so use the maximum",
                )?,
            )?,
            partitions_overdue: register(
                registry,
                Gauge::new(
                    "ingest_partitions_overdue_seconds",
                    "Time since the oldest partition of readings should have been dropped; 0 unless elected, so use the maximum",
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
                "Failed attempts to prepare the tables or to run the upkeep; they are repeated",
            )?,
            clock_offset: register(
                registry,
                Gauge::new(
                    "ingest_clock_offset_seconds",
                    "This machine's clock minus the primary's, measured every second at the middle of the round trip",
                )?,
            )?,
            clock_uncertain: register(
                registry,
                IntGauge::new(
                    "ingest_clock_uncertain",
                    "1 while the clocks disagree with one another, with their earlier times or with the stored readings; readings that one of \
                     them accepts are not refused",
                )?,
            )?,
            letters: LetterMetrics::new(registry)?,
        };
        for what in Tolerated::ALL {
            metrics.tolerated.with_label_values(&[what.as_str()]);
        }
        for reason in Reason::ALL {
            metrics.dead_letters.with_label_values(&[reason.as_str()]);
        }
        Ok(metrics)
    }
}

/// What the sampled re-read of committed keys exports.
#[derive(Debug, Clone)]
pub struct AuditMetrics {
    pub checked: IntCounterVec,
    pub missing: IntCounterVec,
    pub unverified: IntCounter,
    pub skipped: IntCounter,
    last_success: Gauge,
}

impl AuditMetrics {
    /// # Errors
    /// When a name is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let by_role = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &["role"]);
        let metrics = Self {
            checked: register(
                registry,
                by_role(
                    "ingest_audit_keys_total",
                    "Keys of committed readings or sessions that the audit read again",
                )?,
            )?,
            missing: register(
                registry,
                by_role(
                    "ingest_audit_missing_keys_total",
                    "Keys that were committed and acknowledged but are not in the table",
                )?,
            )?,
            unverified: counter(
                registry,
                "ingest_audit_unverified_keys_total",
                "Keys that were not checked on a standby because it was down or had not replayed their commit",
            )?,
            skipped: counter(
                registry,
                "ingest_audit_skipped_keys_total",
                "Keys that the audit skipped: too many at once, about to be dropped by the retention, or refused by the database",
            )?,
            last_success: register(
                registry,
                Gauge::new(
                    "ingest_audit_last_success_timestamp_seconds",
                    "When committed keys were last read again, seconds since 1970; 0: never",
                )?,
            )?,
        };
        for role in ["primary", "standby"] {
            metrics.checked.with_label_values(&[role]);
            metrics.missing.with_label_values(&[role]);
        }
        Ok(metrics)
    }

    /// `count` keys were asked for; those with the numbers `missing` are not there.
    pub(crate) fn found(&self, role: &str, count: usize, missing: &[usize], keys: &[Key]) {
        self.checked.with_label_values(&[role]).inc_by(count as u64);
        self.missing.with_label_values(&[role]).inc_by(missing.len() as u64);
        for key in missing.iter().filter_map(|number| keys.get(*number)).take(10) {
            tracing::error!(
                role,
                id = %key.id.escape_debug(),
                at = %jiff::Timestamp::from_microsecond(key.at_us).unwrap_or_default(),
                "acknowledged, and not in the table"
            );
        }
    }

    pub(crate) fn succeeded(&self, now_us: i64) {
        self.last_success.set(now_us as f64 / 1e6);
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
