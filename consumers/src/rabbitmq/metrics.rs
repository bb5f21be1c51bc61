//! What the RabbitMQ source exports beside `ingest`'s series.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts};
use service::metrics::Registry;

#[derive(Debug, Clone)]
pub struct SourceMetrics {
    pub connected: IntGauge,
    pub reconnects: IntCounter,
    pub paused: IntCounter,
    pub stale_acknowledgements: IntCounter,
    pub requeued: IntCounter,
    pub dead_lettered: IntCounterVec,
}

impl SourceMetrics {
    /// # Errors
    /// When a name is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            connected: IntGauge::new("rabbitmq_connected", "1 while consuming from the broker")?,
            reconnects: IntCounter::new(
                "rabbitmq_reconnects_total",
                "Connections to the broker that ended or failed",
            )?,
            paused: IntCounter::new(
                "rabbitmq_reading_paused_total",
                "Times reading from the broker paused because the queue was full",
            )?,
            stale_acknowledgements: IntCounter::new(
                "rabbitmq_stale_acknowledgements_total",
                "Acknowledgements not sent because their connection had ended; the broker delivers again",
            )?,
            requeued: IntCounter::new(
                "rabbitmq_requeued_total",
                "Times everything unacknowledged went back to the queue because the database was away too long",
            )?,
            dead_lettered: IntCounterVec::new(
                Opts::new(
                    "rabbitmq_dead_lettered_total",
                    "Messages passed to the dead-letter exchange: published with their reason, or rejected",
                ),
                &["way"],
            )?,
        };
        registry.register(Box::new(metrics.connected.clone()))?;
        registry.register(Box::new(metrics.reconnects.clone()))?;
        registry.register(Box::new(metrics.paused.clone()))?;
        registry.register(Box::new(metrics.stale_acknowledgements.clone()))?;
        registry.register(Box::new(metrics.requeued.clone()))?;
        registry.register(Box::new(metrics.dead_lettered.clone()))?;
        Ok(metrics)
    }
}
