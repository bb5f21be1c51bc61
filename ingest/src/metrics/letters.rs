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
                "What dead_letters takes on disk, with its indexes; 0 unless elected to the upkeep, so take the maximum",
            )?,
            max_bytes: gauge(
                "ingest_dead_letters_max_bytes",
                "What it may take (ingest.dead_letter_max_bytes); 0 unless elected",
            )?,
            rows: gauge(
                "ingest_dead_letters_rows",
                "Letters in it, by the server's statistics; 0 unless elected",
            )?,
            cut: gauge(
                "ingest_dead_letters_cut",
                "What is left out of new letters because the current day takes too much: 0 nothing, 1 payloads, 2 all of it: they are only \
                 counted; 0 unless elected",
            )?,
            dropped: register(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "ingest_dead_letters_dropped_total",
                        "Dead letters dropped, for their age or for the table's size",
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
