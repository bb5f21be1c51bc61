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

/// A restart, a deployment, a machine that is replaced: within this a consumer is back.
const SHORTEST_EXPIRY: Duration = Duration::from_secs(3600);

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

/// Subscription and session of `mqtt-consumer`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConsumerSettings {
    /// Name of the session in which the broker keeps messages while the consumer is down. Must be unique and
    /// the same after a restart.
    pub client_id: String,
    /// Topic filter to subscribe to. For several consumers use `$share/NAME/og/field/#`. A member that is not
    /// started again must leave: `mqtt-consumer --leave` (docs/outages.md).
    pub filter: String,
    /// Maximum number of unacknowledged messages that the broker sends to this consumer.
    pub receive_maximum: u16,
    /// Maximum size of a packet from the broker. Must be above the broker's own limit; otherwise the broker
    /// drops larger packets without notice.
    #[schemars(with = "String", extend("format" = "size"))]
    pub max_packet: ByteSize,
    /// Time for which the broker keeps the session of a disconnected consumer; at least an hour.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub session_expiry: Duration,
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
        // A text of MQTT has two bytes for its length, and no NUL.
        if consumer.client_id.len() > 65_535 || consumer.client_id.contains('\0') {
            return Err("mqtt_consumer.client_id must be at most 65535 bytes and without NUL".into());
        }
        check_filter(&consumer.filter).map_err(|problem| format!("mqtt_consumer.filter {problem}"))?;
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
        if consumer.session_expiry < SHORTEST_EXPIRY {
            return Err(
                "mqtt_consumer.session_expiry must be at least 1h: what the broker acknowledges to devices while this consumer is away \
                 for longer is lost"
                    .into(),
            );
        }
        Ok(())
    }
}

/// A broker ends the connection of a client whose filter is not one, mostly without a word.
fn check_filter(filter: &str) -> Result<(), &'static str> {
    if filter.len() > 65_535 || filter.contains('\0') {
        return Err("must be at most 65535 bytes and without NUL");
    }
    let topics = match filter.strip_prefix("$share/") {
        None => filter,
        Some(shared) => match shared.split_once('/') {
            Some((name, topics)) if !name.is_empty() && !name.contains(['+', '#']) => topics,
            _ => return Err("must be $share/NAME/FILTER, the name without + and #"),
        },
    };
    if topics.is_empty() {
        return Err("must not be empty");
    }
    let mut levels = topics.split('/').peekable();
    while let Some(level) = levels.next() {
        if level.len() > 1 && level.contains(['+', '#']) {
            return Err("must have + and # as whole levels only, such as og/+/#");
        }
        if level == "#" && levels.peek().is_some() {
            return Err("must have # at its end only");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_is_none_is_named() {
        for good in ["og/field/#", "#", "+", "og/+/x", "/", "$share/ingest/og/#", "$share/a//b", "$SYS/#"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "og/#/x",
            "og/a#",
            "og/+x",
            "$share/ingest",
            "$share//og",
            "$share/a+/og",
            "$share/a/",
            "a\0",
        ] {
            let settings = MqttConsumerSettings {
                mqtt_consumer: ConsumerSettings { filter: bad.into(), ..ConsumerSettings::default() },
                ..MqttConsumerSettings::default()
            };
            assert!(settings.check().unwrap_err().contains("mqtt_consumer.filter"), "{bad}");
        }
    }
}
