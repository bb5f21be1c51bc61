//! What the MQTT source exports beside `ingest`'s series.

use std::time::Duration;

use jiff::Timestamp;
use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, Opts};
use service::metrics::Registry;

use super::error::ConnectionError;
use crate::LASTED;

#[derive(Debug, Clone)]
pub struct SourceMetrics {
    pub connected: IntGauge,
    pub reconnects: IntCounter,
    pub connections_ended: IntCounterVec,
    pub connections_ended_early: IntCounter,
    pub sessions_lost: IntCounter,
    pub session_lost_at: Gauge,
    pub session_expiry: IntGauge,
    pub paused: IntCounter,
    pub unanswerable: IntCounter,
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
            connections_ended: IntCounterVec::new(
                Opts::new(
                    "mqtt_connections_ended_total",
                    "Connections to the broker that ended or failed, by reason",
                ),
                &["reason"],
            )?,
            connections_ended_early: IntCounter::new(
                "mqtt_connections_ended_early_total",
                "Connections to the broker that ended within 10 seconds after they were subscribed",
            )?,
            sessions_lost: IntCounter::new(
                "mqtt_sessions_lost_total",
                "Times the broker had no session for this client id although one existed before",
            )?,
            session_lost_at: Gauge::new(
                "mqtt_session_lost_timestamp_seconds",
                "Time at which the broker was last found to have lost the session, also by an earlier process; 0: never",
            )?,
            session_expiry: IntGauge::new(
                "mqtt_session_expiry_seconds",
                "Time for which the broker keeps the session of this consumer after it disconnects",
            )?,
            paused: IntCounter::new(
                "mqtt_reading_paused_total",
                "Times reading from the broker paused because the queue was full",
            )?,
            unanswerable: IntCounter::new(
                "mqtt_unanswerable_total",
                "Messages without a readable packet id: skipped, not acknowledged, and kept by the broker",
            )?,
            stale_acknowledgements: IntCounter::new(
                "mqtt_stale_acknowledgements_total",
                "Acknowledgements not sent because their connection had ended; the broker delivers again",
            )?,
        };
        registry.register(Box::new(metrics.connected.clone()))?;
        registry.register(Box::new(metrics.reconnects.clone()))?;
        registry.register(Box::new(metrics.connections_ended.clone()))?;
        registry.register(Box::new(metrics.connections_ended_early.clone()))?;
        registry.register(Box::new(metrics.sessions_lost.clone()))?;
        registry.register(Box::new(metrics.session_lost_at.clone()))?;
        registry.register(Box::new(metrics.session_expiry.clone()))?;
        registry.register(Box::new(metrics.paused.clone()))?;
        registry.register(Box::new(metrics.unanswerable.clone()))?;
        registry.register(Box::new(metrics.stale_acknowledgements.clone()))?;
        // All of them from the start: the first of a kind is an increase too.
        for label in ConnectionError::LABELS {
            metrics.connections_ended.with_label_values(&[label]);
        }
        Ok(metrics)
    }

    /// A connection has ended that was subscribed for so long, or `None` if it never was.
    pub(super) fn ended(&self, error: &ConnectionError, subscribed: Option<Duration>) {
        self.connected.set(0);
        self.reconnects.inc();
        self.connections_ended.with_label_values(&[error.label()]).inc();
        if subscribed.is_some_and(|lasted| lasted < LASTED) {
            self.connections_ended_early.inc();
        }
    }

    pub(super) fn session_lost(&self, at: Timestamp) {
        self.sessions_lost.inc();
        self.set_session_lost_at(at);
    }

    /// What an earlier process has found.
    pub fn set_session_lost_at(&self, at: Timestamp) {
        self.session_lost_at.set(at.as_millisecond() as f64 / 1e3);
    }
}
