//! What the RabbitMQ source exports beside `ingest`'s series.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts};
use service::metrics::Registry;

#[derive(Debug, Clone)]
pub struct SourceMetrics {
    pub connected: IntGauge,
    pub reconnects: IntCounter,
    pub ended_early: IntCounter,
    pub paused: IntCounter,
    pub stale_acknowledgements: IntCounter,
    pub requeued: IntCounter,
    pub dead_lettered: IntCounterVec,
    pub returned: IntCounterVec,
    pub queue_deleted: IntCounter,
    pub queue_consumers: IntGauge,
    pub redelivered: IntCounter,
    pub window: IntGauge,
    pub held_back: IntCounter,
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
            ended_early: IntCounter::new(
                "rabbitmq_connections_ended_early_total",
                "Connections that ended within 10 s after they began to consume",
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
                "Times all unacknowledged messages were returned to the queue because the database was down too long",
            )?,
            dead_lettered: IntCounterVec::new(
                Opts::new(
                    "rabbitmq_dead_lettered_total",
                    "Messages refused and committed to dead_letters, with or without a copy published to the dead-letter exchange",
                ),
                &["way"],
            )?,
            returned: IntCounterVec::new(
                Opts::new(
                    "rabbitmq_returned_total",
                    "Events that the broker had moved to the dead-letter queue and that were put back, by the broker's reason",
                ),
                &["reason"],
            )?,
            queue_deleted: IntCounter::new(
                "rabbitmq_queue_deleted_total",
                "Times the queue was deleted with its content and created again",
            )?,
            queue_consumers: IntGauge::new(
                "rabbitmq_session_queue_consumers",
                "Consumers of the queue as counted by the broker, including this one",
            )?,
            redelivered: IntCounter::new(
                "rabbitmq_redelivered_total",
                "Messages that the broker had delivered before, to this consumer or another",
            )?,
            window: IntGauge::new(
                "rabbitmq_prefetch_messages",
                "Current window of unacknowledged messages, which depends on their size",
            )?,
            held_back: IntCounter::new(
                "rabbitmq_held_back_total",
                "Times the connection was not read because messages of rabbitmq_consumer.prefetch_bytes waited",
            )?,
        };
        // From the start: an alert on a series that appears with its first event misses that event.
        for reason in super::letter::REASONS {
            metrics.returned.with_label_values(&[reason]);
        }
        registry.register(Box::new(metrics.connected.clone()))?;
        registry.register(Box::new(metrics.reconnects.clone()))?;
        registry.register(Box::new(metrics.ended_early.clone()))?;
        registry.register(Box::new(metrics.paused.clone()))?;
        registry.register(Box::new(metrics.stale_acknowledgements.clone()))?;
        registry.register(Box::new(metrics.requeued.clone()))?;
        registry.register(Box::new(metrics.dead_lettered.clone()))?;
        registry.register(Box::new(metrics.returned.clone()))?;
        registry.register(Box::new(metrics.queue_deleted.clone()))?;
        registry.register(Box::new(metrics.queue_consumers.clone()))?;
        registry.register(Box::new(metrics.redelivered.clone()))?;
        registry.register(Box::new(metrics.window.clone()))?;
        registry.register(Box::new(metrics.held_back.clone()))?;
        Ok(metrics)
    }
}
