//! Settings of `rabbitmq-consumer`.

use std::time::Duration;

use amqp::Broker;
use bytesize::ByteSize;
use ingest::settings::{DatabaseSettings, IngestSettings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::http::HttpSettings;
use service::logs::LogSettings;
use service::settings::Settings;
use service::traces::TraceSettings;

/// All sections `rabbitmq-consumer` reads.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RabbitConsumerSettings {
    pub log: LogSettings,
    pub http: HttpSettings,
    pub traces: TraceSettings,
    pub database: DatabaseSettings,
    pub rabbitmq: Broker,
    pub ingest: IngestSettings,
    pub rabbitmq_consumer: ConsumerSettings,
}

/// Consumption and batching of `rabbitmq-consumer`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConsumerSettings {
    /// Maximum number of unacknowledged messages that the broker sends to this consumer; fewer when they are
    /// large (`rabbitmq_consumer.prefetch_bytes`). A batch contains at most half of them.
    pub prefetch: u16,
    /// Maximum size of messages that wait in the connection, and again in the queue behind it (instead of a
    /// larger `ingest.queue_bytes`). The process needs at most about five times this.
    #[schemars(with = "String", extend("format" = "size"))]
    pub prefetch_bytes: ByteSize,
    /// A batch closes when its oldest message has waited this long. Replaces `ingest.max_age`. It is longer
    /// because Postgres has less work when more events of a session merge into one row.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_age: Duration,
    /// Messages that cannot be committed for this long are returned to the queue, where another consumer may
    /// succeed. Must be below the broker's `consumer_timeout` (30 min), after which it closes the channel.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub requeue_after: Duration,
    /// Maximum time to drain after SIGTERM. Uncommitted messages stay with the broker.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub grace: Duration,
    /// Migrate the schema at start.
    pub migrate: bool,
}

impl Default for ConsumerSettings {
    fn default() -> Self {
        Self {
            prefetch: 5000,
            prefetch_bytes: ByteSize::mib(32),
            max_age: Duration::from_millis(100),
            requeue_after: Duration::from_secs(15 * 60),
            grace: Duration::from_secs(30),
            migrate: true,
        }
    }
}

impl RabbitConsumerSettings {
    /// `[ingest]`, with batches of our own age and of at most half the window: while one is committed the next must be able
    /// to fill, and none may wait for messages that the broker will not send. The queue holds no more than the connection may.
    #[must_use]
    pub fn ingest(&self) -> IngestSettings {
        let half = usize::from(self.rabbitmq_consumer.prefetch / 2).max(1);
        IngestSettings {
            max_rows: self.ingest.max_rows.min(half),
            max_age: self.rabbitmq_consumer.max_age,
            queue_bytes: self.ingest.queue_bytes.min(self.rabbitmq_consumer.prefetch_bytes),
            ..self.ingest.clone()
        }
    }
}

impl Settings for RabbitConsumerSettings {
    const SECTIONS: &'static [&'static str] =
        &["log", "http", "traces", "database", "rabbitmq", "ingest", "rabbitmq_consumer"];

    fn check(&self) -> Result<(), String> {
        self.log.check()?;
        self.traces.check()?;
        self.database.check()?;
        self.rabbitmq.check()?;
        self.ingest.check()?;
        let consumer = &self.rabbitmq_consumer;
        if consumer.prefetch == 0 {
            return Err("rabbitmq_consumer.prefetch must be above 0".into());
        }
        if usize::from(consumer.prefetch) > self.ingest.queue_messages {
            return Err(format!(
                "rabbitmq_consumer.prefetch ({}) must not exceed ingest.queue_messages ({})",
                consumer.prefetch, self.ingest.queue_messages
            ));
        }
        if consumer.prefetch_bytes < self.ingest.max_payload {
            return Err(format!(
                "rabbitmq_consumer.prefetch_bytes ({}) must be at least ingest.max_payload ({})",
                consumer.prefetch_bytes, self.ingest.max_payload
            ));
        }
        if consumer.requeue_after < self.database.commit_timeout {
            return Err("rabbitmq_consumer.requeue_after must be at least database.commit_timeout".into());
        }
        Ok(())
    }
}
