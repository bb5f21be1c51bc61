//! Settings of `mqtt-consumer`.

use std::time::Duration;

use bytesize::ByteSize;
use ingest::settings::{DatabaseSettings, IngestSettings};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::http::HttpSettings;
use service::logs::LogSettings;
use service::secret::Secret;
use service::settings::Settings;
use service::traces::TraceSettings;
use wire::mqtt::MqttSettings;

/// All sections `mqtt-consumer` reads.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MqttConsumerSettings {
    pub log: LogSettings,
    pub http: HttpSettings,
    pub traces: TraceSettings,
    pub database: DatabaseSettings,
    pub mqtt: MqttSettings<Secret>,
    pub ingest: IngestSettings,
    pub mqtt_consumer: ConsumerSettings,
}

/// What `mqtt-consumer` subscribes to, and how.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConsumerSettings {
    /// Names the session in which the broker keeps messages while the consumer is away: stable over restarts, unique.
    pub client_id: String,
    /// What to subscribe to. For several consumers `$share/NAME/og/field/#`; one that is not started again must leave:
    /// `mqtt-consumer --leave` (docs/outages.md).
    pub filter: String,
    /// Messages the broker may have outstanding towards this consumer.
    pub receive_maximum: u16,
    /// Largest packet the broker may send; above its own limit, or it would drop larger ones in silence.
    #[schemars(with = "String", extend("format" = "size"))]
    pub max_packet: ByteSize,
    /// How long the broker keeps the session of an absent consumer.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub session_expiry: Duration,
    /// Longest drain after SIGTERM. What is not committed then stays with the broker.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub grace: Duration,
    /// Bring the schema up to date at start.
    pub migrate: bool,
}

impl Default for ConsumerSettings {
    fn default() -> Self {
        Self {
            client_id: "tier0-mqtt-consumer".into(),
            filter: wire::topic::FILTER.into(),
            receive_maximum: 60_000,
            max_packet: ByteSize::mib(17),
            session_expiry: Duration::from_secs(7 * 24 * 3600),
            grace: Duration::from_secs(30),
            migrate: true,
        }
    }
}

impl Settings for MqttConsumerSettings {
    const SECTIONS: &'static [&'static str] =
        &["log", "http", "traces", "database", "mqtt", "ingest", "mqtt_consumer"];

    fn check(&self) -> Result<(), String> {
        self.log.check()?;
        self.traces.check()?;
        self.database.check()?;
        self.mqtt.check()?;
        self.ingest.check()?;
        let consumer = &self.mqtt_consumer;
        if consumer.client_id.is_empty() {
            return Err(
                "mqtt_consumer.client_id must not be empty: it names the session that holds messages".into(),
            );
        }
        if consumer.receive_maximum == 0 {
            return Err("mqtt_consumer.receive_maximum must be above 0".into());
        }
        if usize::from(consumer.receive_maximum) > self.ingest.queue_messages {
            return Err(format!(
                "mqtt_consumer.receive_maximum ({}) must not exceed ingest.queue_messages ({})",
                consumer.receive_maximum, self.ingest.queue_messages
            ));
        }
        if consumer.max_packet.as_u64() < self.ingest.max_payload.as_u64() {
            return Err("mqtt_consumer.max_packet must be at least ingest.max_payload".into());
        }
        if consumer.max_packet.as_u64() > 268_435_455 {
            return Err("mqtt_consumer.max_packet must not exceed MQTT's limit of 256MiB".into());
        }
        if consumer.session_expiry.is_zero() {
            return Err(
                "mqtt_consumer.session_expiry must be above 0: the session must outlive a connection".into(),
            );
        }
        Ok(())
    }
}
