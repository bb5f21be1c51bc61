//! What the MQTT source exports beside `ingest`'s series.

use std::sync::Arc;

use ingest::queue::Level;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntGauge, Registry};

#[derive(Debug, Clone)]
pub struct SourceMetrics {
    pub connected: IntGauge,
    pub reconnects: IntCounter,
    pub paused: IntCounter,
    pub stale_acknowledgements: IntCounter,
}

impl SourceMetrics {
    /// # Errors
    /// When a name is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            connected: IntGauge::new("mqtt_connected", "1 while subscribed at the broker")?,
            reconnects: IntCounter::new(
                "mqtt_reconnects_total",
                "Connections to the broker that ended or failed",
            )?,
            paused: IntCounter::new(
                "mqtt_reading_paused_total",
                "Times reading from the broker paused because the queue was full",
            )?,
            stale_acknowledgements: IntCounter::new(
                "mqtt_stale_acknowledgements_total",
                "Acknowledgements not sent because their connection had ended; the broker delivers again",
            )?,
        };
        registry.register(Box::new(metrics.connected.clone()))?;
        registry.register(Box::new(metrics.reconnects.clone()))?;
        registry.register(Box::new(metrics.paused.clone()))?;
        registry.register(Box::new(metrics.stale_acknowledgements.clone()))?;
        Ok(metrics)
    }
}

/// The queue's level, read when Prometheus asks.
pub struct QueueCollector {
    level: Arc<Level>,
    messages: IntGauge,
    bytes: IntGauge,
}

impl QueueCollector {
    /// # Errors
    /// When a name is not valid.
    pub fn new(level: Arc<Level>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            level,
            messages: IntGauge::new(
                "ingest_queue_messages",
                "Messages taken from the broker and not yet settled",
            )?,
            bytes: IntGauge::new(
                "ingest_queue_bytes",
                "Bytes of messages taken from the broker and not yet settled",
            )?,
        })
    }
}

impl Collector for QueueCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.messages.desc().into_iter().chain(self.bytes.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.messages.set(i64::try_from(self.level.messages()).unwrap_or(i64::MAX));
        self.bytes.set(i64::try_from(self.level.bytes()).unwrap_or(i64::MAX));
        self.messages.collect().into_iter().chain(self.bytes.collect()).collect()
    }
}
