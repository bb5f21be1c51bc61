//! How to reach the MQTT broker: section `[mqtt]`, read by every process that speaks MQTT. Opens no connection.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Connection to the MQTT broker.
// `P` is the type that keeps the password from logs; this crate has none of its own, the processes put
// `service::secret::Secret` in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MqttSettings<P: Default> {
    /// Host name or address of the broker.
    pub host: String,
    /// Port of the broker, without TLS.
    pub port: u16,
    /// Empty: the client sends neither user name nor password.
    pub username: String,
    /// Sent with `username`.
    pub password: P,
    /// Maximum idle time before a ping. The broker disconnects a client after 1.5 times this.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub keep_alive: Duration,
    /// Maximum time for TCP and CONNACK together.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub connect_timeout: Duration,
}

impl<P: Default> Default for MqttSettings<P> {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 1883,
            username: String::new(),
            password: P::default(),
            keep_alive: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(5),
        }
    }
}

impl<P: Default> MqttSettings<P> {
    /// # Errors
    /// One sentence that names the key and the bound.
    pub fn check(&self) -> Result<(), String> {
        if self.host.is_empty() {
            return Err("mqtt.host must not be empty".into());
        }
        if self.port == 0 {
            return Err("mqtt.port must be 1 to 65535".into());
        }
        // MQTT carries whole seconds in two bytes; 0 would switch the broker's dead-client check off.
        if self.keep_alive < Duration::from_secs(1) || self.keep_alive > Duration::from_secs(65_535) {
            return Err(format!("mqtt.keep_alive must be 1s to 65535s, not {:?}", self.keep_alive));
        }
        if self.connect_timeout.is_zero() {
            return Err("mqtt.connect_timeout must be above 0".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_named() {
        let good = MqttSettings::<String>::default();
        assert_eq!(good.check(), Ok(()));
        for (bad, key) in [
            (MqttSettings { host: String::new(), ..good.clone() }, "mqtt.host"),
            (MqttSettings { port: 0, ..good.clone() }, "mqtt.port"),
            (MqttSettings { keep_alive: Duration::from_millis(1), ..good.clone() }, "mqtt.keep_alive"),
            (MqttSettings { keep_alive: Duration::from_secs(70_000), ..good.clone() }, "mqtt.keep_alive"),
            (MqttSettings { connect_timeout: Duration::ZERO, ..good.clone() }, "mqtt.connect_timeout"),
        ] {
            assert!(bad.check().unwrap_err().contains(key));
        }
    }
}
