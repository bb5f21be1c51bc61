//! How to reach RabbitMQ and what its queues are called: section `[rabbitmq]`, read by every process that speaks AMQP.
//! Opens no connection.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A name longer than this does not fit into AMQP's short string.
const MAX_NAME_BYTES: usize = 200;

/// What kind of queue messages wait in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum QueueType {
    /// Replicated over the nodes of a cluster, written before it is confirmed.
    Quorum,
    /// On one node.
    Classic,
}

impl QueueType {
    /// As in the queue's argument `x-queue-type`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }
}

/// Connection to RabbitMQ, and the queue.
// `P` is the type that keeps the password from logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RabbitSettings<P: Default> {
    /// Host name or address of the broker.
    pub host: String,
    /// Port of the broker for AMQP, without TLS.
    pub port: u16,
    /// Virtual host of the queue.
    pub vhost: String,
    /// `guest` with an empty password is RabbitMQ's default account, which only this machine may use.
    pub username: String,
    /// Empty: the password is the user name, as for `guest`.
    pub password: P,
    /// Queue of user activity. `webapp_active_users` is a second well-known name. Dead letters go to
    /// `QUEUE.dead-letter`.
    pub queue: String,
    /// Type of the queue and of its dead-letter queue when they are created. Existing queues are used
    /// unchanged.
    pub queue_type: QueueType,
    /// Create missing queues. `false`: wait until the queue exists.
    pub declare: bool,
    /// A peer that is silent for twice this time is disconnected.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub heartbeat: Duration,
    /// Maximum time for TCP, login and declaration together.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub connect_timeout: Duration,
}

impl<P: Default> Default for RabbitSettings<P> {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 5672,
            vhost: "/".into(),
            username: "guest".into(),
            password: P::default(),
            queue: "user_activity_queue".into(),
            queue_type: QueueType::Quorum,
            declare: true,
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
        }
    }
}

impl<P: Default> RabbitSettings<P> {
    /// Where refused messages go, a fanout exchange.
    #[must_use]
    pub fn dead_letter_exchange(&self) -> String {
        format!("{}.dead-letter", self.queue)
    }

    /// Where they wait for somebody to look at them.
    #[must_use]
    pub fn dead_letter_queue(&self) -> String {
        format!("{}.dead-letter", self.queue)
    }

    /// # Errors
    /// One sentence that names the key and the bound.
    pub fn check(&self) -> Result<(), String> {
        if self.host.is_empty() {
            return Err("rabbitmq.host must not be empty".into());
        }
        if self.port == 0 {
            return Err("rabbitmq.port must be 1 to 65535".into());
        }
        if self.queue.is_empty() || self.queue.len() > MAX_NAME_BYTES || self.queue.starts_with("amq.") {
            return Err(format!(
                "rabbitmq.queue must have 1 to {MAX_NAME_BYTES} bytes and not begin with \"amq.\""
            ));
        }
        // AMQP carries whole seconds in two bytes; 0 would switch the check off.
        if self.heartbeat < Duration::from_secs(1) || self.heartbeat > Duration::from_secs(65_535) {
            return Err(format!("rabbitmq.heartbeat must be 1s to 65535s, not {:?}", self.heartbeat));
        }
        if self.connect_timeout.is_zero() {
            return Err("rabbitmq.connect_timeout must be above 0".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_named() {
        let good = RabbitSettings::<String>::default();
        assert_eq!(good.check(), Ok(()));
        for (bad, key) in [
            (RabbitSettings { host: String::new(), ..good.clone() }, "rabbitmq.host"),
            (RabbitSettings { port: 0, ..good.clone() }, "rabbitmq.port"),
            (RabbitSettings { queue: String::new(), ..good.clone() }, "rabbitmq.queue"),
            (RabbitSettings { queue: "x".repeat(300), ..good.clone() }, "rabbitmq.queue"),
            (RabbitSettings { heartbeat: Duration::ZERO, ..good.clone() }, "rabbitmq.heartbeat"),
            (RabbitSettings { connect_timeout: Duration::ZERO, ..good.clone() }, "rabbitmq.connect_timeout"),
        ] {
            assert!(bad.check().unwrap_err().contains(key));
        }
    }
}
