//! What the MQTT source exports beside `ingest`'s series.

use prometheus::{IntCounter, IntGauge};
use service::metrics::Registry;

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
