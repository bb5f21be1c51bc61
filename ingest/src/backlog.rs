//! How much waits between broker and table, read when Prometheus asks.

use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntGauge};
use service::metrics::Registry;

use crate::queue::Capacity;
use crate::settlement::Settlements;

struct Backlog {
    level: Arc<Capacity>,
    settlements: Arc<Settlements>,
    messages: IntGauge,
    bytes: IntGauge,
    max_messages: IntGauge,
    max_bytes: IntGauge,
    oldest: Gauge,
}

/// Registers the series of one queue.
///
/// # Errors
/// When a name is registered already.
pub fn export(
    registry: &Registry,
    level: Arc<Capacity>,
    settlements: Arc<Settlements>,
) -> Result<(), prometheus::Error> {
    registry.register(Box::new(Backlog {
        level,
        settlements,
        messages: IntGauge::new(
            "ingest_queue_messages",
            "Messages that were received from the broker and are not yet settled",
        )?,
        bytes: IntGauge::new(
            "ingest_queue_bytes",
            "Bytes of messages that were received from the broker and are not yet settled",
        )?,
        max_messages: IntGauge::new(
            "ingest_queue_max_messages",
            "Messages at which reading from the broker pauses",
        )?,
        max_bytes: IntGauge::new("ingest_queue_max_bytes", "Bytes at which reading from the broker pauses")?,
        oldest: Gauge::new(
            "ingest_oldest_unacknowledged_seconds",
            "Age of the oldest uncommitted message since its receipt",
        )?,
    }))
}

fn integer(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Collector for Backlog {
    fn desc(&self) -> Vec<&Desc> {
        [&self.messages, &self.bytes, &self.max_messages, &self.max_bytes]
            .into_iter()
            .flat_map(Collector::desc)
            .chain(self.oldest.desc())
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.messages.set(integer(self.level.messages()));
        self.bytes.set(integer(self.level.bytes()));
        let (max_messages, max_bytes) = self.level.bounds();
        self.max_messages.set(integer(max_messages));
        self.max_bytes.set(integer(max_bytes));
        self.oldest.set(self.settlements.oldest().as_secs_f64());
        [&self.messages, &self.bytes, &self.max_messages, &self.max_bytes]
            .into_iter()
            .flat_map(Collector::collect)
            .chain(self.oldest.collect())
            .collect()
    }
}
