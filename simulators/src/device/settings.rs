//! Section `[device_simulator]`: how many machines, how often, over how many connections, with what trouble.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use service::http::HttpSettings;
use service::logs::LogSettings;
use service::secret::Secret;
use service::settings::Settings;
use wire::mqtt::MqttSettings;

use super::trouble::TroubleSettings;

/// What `device-simulator` reads.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceSimulatorSettings {
    pub log: LogSettings,
    pub http: HttpSettings,
    pub mqtt: MqttSettings<Secret>,
    pub device_simulator: FleetSettings,
}

/// The simulated fleet: number of devices, rate, connections.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FleetSettings {
    /// Number of devices, numbered from 0.
    pub devices: u32,
    /// Each device publishes once in this time, unless `active` or `rate` is set.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub interval: Duration,
    /// Number of messages per interval; the devices take turns.
    #[schemars(example = 1000)]
    pub active: Option<u32>,
    /// Messages per second of all devices together, or `max`: as fast as the broker accepts them.
    #[schemars(example = &"max")]
    pub rate: Option<Rate>,
    /// Readings per message. Above 1 the message is a JSON array, like a gateway's buffered upload.
    pub array: u16,
    /// Time between two readings of one array.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub array_spacing: Duration,
    /// MQTT quality of service, 0 or 1.
    pub qos: u8,
    /// The same seed gives the same devices, values and faults.
    pub seed: u64,
    /// Number of MQTT connections. The devices are assigned to them in turn. At most the number of devices.
    pub connections: u32,
    /// Prefix of the client ids. A part that is new in each run and the connection's number follow.
    pub client_id: String,
    /// Maximum number of unacknowledged messages per connection. Bounds memory: about 64 bytes each.
    pub max_in_flight: u16,
    /// Interval between publishing steps on each connection.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub tick: Duration,
    /// Messages that were due longer ago than this are skipped and counted.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_behind: Duration,
    /// Stop after this time, counted from the first connection.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "Option<String>", extend("format" = "time"), example = &"60s")]
    pub run_for: Option<Duration>,
    /// Stop after this many messages.
    #[schemars(example = 1_000_000)]
    pub count: Option<u64>,
    /// Path of the ledger.
    #[schemars(extend("format" = "path"), example = &"ledger.json")]
    pub ledger: Option<PathBuf>,
    /// Interval at which the ledger is also written during the run, so that a killed simulator leaves a
    /// recent one.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub ledger_every: Duration,
    /// Path of the final summary, as JSON.
    #[schemars(extend("format" = "path"), example = &"summary.json")]
    pub summary: Option<PathBuf>,
    /// Maximum time to wait for outstanding acknowledgements at the end.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub grace: Duration,
    /// When the broker has not answered for this long, the simulator reconnects.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub answer_timeout: Duration,
    /// Maximum time between two attempts to connect.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_backoff: Duration,
    pub trouble: TroubleSettings,
}

impl Default for FleetSettings {
    fn default() -> Self {
        Self {
            devices: 100_000,
            interval: Duration::from_secs(5),
            active: None,
            rate: None,
            array: 1,
            array_spacing: Duration::from_millis(10),
            qos: 1,
            seed: 1,
            connections: 16,
            client_id: "device-simulator".into(),
            max_in_flight: 1000,
            tick: Duration::from_millis(10),
            max_behind: Duration::from_secs(5),
            run_for: None,
            count: None,
            ledger: None,
            ledger_every: Duration::from_secs(10),
            summary: None,
            grace: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(30),
            max_backoff: Duration::from_secs(2),
            trouble: TroubleSettings::default(),
        }
    }
}

impl Settings for DeviceSimulatorSettings {
    const SECTIONS: &'static [&'static str] = &["log", "http", "mqtt", "device_simulator"];

    fn check(&self) -> Result<(), String> {
        self.log.check()?;
        self.mqtt.check()?;
        self.device_simulator.check()
    }
}

impl FleetSettings {
    fn check(&self) -> Result<(), String> {
        let key = |name: &str, problem: &str| Err(format!("device_simulator.{name} {problem}"));
        // The fleet's ids have room for more, the contract's registry lists 100,000.
        if !(1..=10_000_000).contains(&self.devices) {
            return key("devices", "must be 1 to 10000000");
        }
        if self.connections == 0 {
            return key("connections", "must be at least 1");
        }
        if self.active.is_some_and(|active| !(1..=self.devices).contains(&active)) {
            return key("active", "must be 1 to device_simulator.devices");
        }
        if self.active.is_some() && self.rate.is_some() {
            return key("active", "and device_simulator.rate exclude each other");
        }
        if self.qos > 1 {
            return key("qos", "must be 0 or 1");
        }
        if !(1..=10_000).contains(&self.array) {
            return key("array", "must be 1 to 10000");
        }
        if self.count == Some(0) {
            return key("count", "must be at least 1");
        }
        if self.max_in_flight == 0 {
            return key("max_in_flight", "must be 1 to 65535");
        }
        // Below a microsecond two readings would share a timestamp, and with it their identity.
        if self.array_spacing < Duration::from_micros(2) {
            return key("array_spacing", "must be at least 2us");
        }
        if self.tick < Duration::from_millis(1) || self.tick > Duration::from_secs(1) {
            return key("tick", "must be 1ms to 1s");
        }
        for (name, time) in [
            ("interval", self.interval),
            ("max_behind", self.max_behind),
            ("ledger_every", self.ledger_every),
            ("answer_timeout", self.answer_timeout),
            ("max_backoff", self.max_backoff),
        ] {
            if time < Duration::from_millis(100) {
                return key(name, "must be at least 100ms");
            }
        }
        self.trouble.check().map_err(|(name, problem)| format!("device_simulator.trouble.{name} {problem}"))
    }

    /// Messages per second over the whole fleet; `None` is as fast as they are taken.
    #[must_use]
    pub fn messages_per_second(&self) -> Option<f64> {
        match self.rate {
            Some(Rate::Max) => None,
            Some(Rate::PerSecond(rate)) => Some(rate),
            None => Some(f64::from(self.active.unwrap_or(self.devices)) / self.interval.as_secs_f64()),
        }
    }
}

/// Messages per second: a number above 0, or `max`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rate {
    PerSecond(f64),
    Max,
}

impl Rate {
    fn per_second(rate: f64) -> Option<Self> {
        (rate.is_finite() && rate > 0.0).then_some(Self::PerSecond(rate))
    }
}

impl JsonSchema for Rate {
    fn schema_name() -> Cow<'static, str> {
        "Rate".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["number", "string"], "format": "rate" })
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::PerSecond(rate) => serializer.serialize_f64(*rate),
            Self::Max => serializer.serialize_str("max"),
        }
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Rate;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("messages per second above 0, or \"max\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Rate, E> {
                if text == "max" {
                    return Ok(Rate::Max);
                }
                text.parse()
                    .ok()
                    .and_then(Rate::per_second)
                    .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
            fn visit_f64<E: serde::de::Error>(self, rate: f64) -> Result<Rate, E> {
                Rate::per_second(rate)
                    .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Float(rate), &self))
            }
            #[allow(clippy::cast_precision_loss, reason = "no rate is near 2^53")]
            fn visit_i64<E: serde::de::Error>(self, rate: i64) -> Result<Rate, E> {
                self.visit_f64(rate as f64)
            }
            #[allow(clippy::cast_precision_loss, reason = "no rate is near 2^53")]
            fn visit_u64<E: serde::de::Error>(self, rate: u64) -> Result<Rate, E> {
                self.visit_f64(rate as f64)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::settings::{SettingsArgs, load};

    fn set(overrides: &[&str]) -> Result<FleetSettings, String> {
        let args = SettingsArgs {
            overrides: overrides.iter().map(|text| format!("device_simulator.{text}")).collect(),
            ..SettingsArgs::default()
        };
        load::<DeviceSimulatorSettings>(&args, std::collections::HashMap::new())
            .map(|settings| settings.device_simulator)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_default_is_the_contracts_fleet() {
        let settings = set(&[]).unwrap();
        assert_eq!(settings.messages_per_second(), Some(20_000.0));
        assert_eq!(set(&["active=1000"]).unwrap().messages_per_second(), Some(200.0));
        assert_eq!(set(&["rate=5000"]).unwrap().messages_per_second(), Some(5000.0));
        assert_eq!(set(&["rate=max"]).unwrap().messages_per_second(), None);
        assert_eq!(set(&["run_for=60s"]).unwrap().run_for, Some(Duration::from_secs(60)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            (&["devices=0"][..], "device_simulator.devices"),
            (&["connections=0"], "device_simulator.connections"),
            (&["active=5", "rate=3"], "device_simulator.rate"),
            (&["qos=2"], "device_simulator.qos"),
            (&["rate=fast"], "device_simulator.rate"),
            (&["rate=0"], "device_simulator.rate"),
            (&["rate=-1"], "device_simulator.rate"),
            (&["tick=0s"], "device_simulator.tick"),
            (&["count=0"], "device_simulator.count"),
            (&["array=0"], "device_simulator.array"),
            (&["trouble.not_json=1.5"], "device_simulator.trouble.not_json"),
            (&["trouble.not_json=0.6", "trouble.late=0.6"], "device_simulator.trouble"),
            (&["trouble.unknown=0.6"], "unknown"),
        ] {
            let error = set(text).unwrap_err();
            assert!(error.contains(named), "{text:?}: {error}");
        }
    }
}
