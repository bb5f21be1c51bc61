//! What `dead_letters` takes, measured by the process that keeps the partitions.

use prometheus::{IntCounterVec, IntGauge, Opts};
use service::metrics::Registry;

use super::register;
use crate::maintenance::Storage;

/// Set by the elected process; take the maximum over all.
#[derive(Debug, Clone)]
pub struct LetterMetrics {
    bytes: IntGauge,
    max_bytes: IntGauge,
    rows: IntGauge,
    cut: IntGauge,
    pub dropped: IntCounterVec,
}

impl LetterMetrics {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gauge = |name, help| register(registry, IntGauge::new(name, help)?);
        let metrics = Self {
            bytes: gauge(
                "ingest_dead_letters_bytes",
                "Size of dead_letters on disk, including indexes; 0 unless elected to the upkeep, so use the maximum",
            )?,
            max_bytes: gauge(
                "ingest_dead_letters_max_bytes",
                "Maximum size of dead_letters (ingest.dead_letter_max_bytes); 0 unless elected",
            )?,
            rows: gauge(
                "ingest_dead_letters_rows",
                "Rows in dead_letters, from the server's statistics; 0 unless elected",
            )?,
            cut: gauge(
                "ingest_dead_letters_cut",
                "What new dead letters leave out because the current day uses too much space: 0 nothing, 1 payloads, 2 everything (they \
                 are only counted); 0 unless elected",
            )?,
            dropped: register(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "ingest_dead_letters_dropped_total",
                        "Dead letters dropped because of their age or the table's size",
                    ),
                    &["cause"],
                )?,
            )?,
        };
        for cause in ["retention", "size"] {
            metrics.dropped.with_label_values(&[cause]);
        }
        Ok(metrics)
    }

    pub(crate) fn set(&self, bytes: u64, rows: u64, max_bytes: u64, storage: Storage) {
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.bytes.set(gauge(bytes));
        self.rows.set(gauge(rows));
        self.max_bytes.set(gauge(max_bytes));
        self.cut.set(match storage {
            Storage { letters: false, .. } => 2,
            Storage { payloads: false, .. } => 1,
            Storage { .. } => 0,
        });
    }

    /// Another process may be elected now.
    pub(crate) fn forget(&self) {
        for gauge in [&self.bytes, &self.max_bytes, &self.rows, &self.cut] {
            gauge.set(0);
        }
    }
}
