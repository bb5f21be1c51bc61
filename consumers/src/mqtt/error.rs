//! Why a connection ended, in words that say what to do.

use std::io;

use rumqttc::v5::mqttbytes;

use super::packet::PacketError;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the broker closed the connection without a reason")]
    Closed,
    #[error("no answer to {0} in time")]
    Timeout(&'static str),
    /// Something else than an MQTT broker answers.
    #[error("{0}")]
    NotMqtt(String),
    #[error("the broker refuses the connection: {0}")]
    Refused(String),
    /// The broker accepted, but what it grants is not enough to keep the promise.
    #[error("the broker does not grant what this consumer needs: {0}")]
    Unusable(String),
    #[error("the broker refuses the subscription: {0}")]
    NotSubscribed(String),
    #[error(
        "another process uses client id {0} and has taken the session over: stop one of them, or give each its own \
         mqtt_consumer.client_id and a shared filter ($share/NAME/..)"
    )]
    TakenOver(String),
    #[error("the broker ended the connection: {0}")]
    Disconnected(String),
    #[error("{0}")]
    Packet(#[from] PacketError),
    #[error("the broker broke the MQTT protocol: unexpected {0}")]
    Unexpected(&'static str),
    /// A session that was to be ended is dealt to.
    #[error("readings still come to a session that is to be ended")]
    StillDealt,
    #[error("a packet of this consumer cannot be written: {0}")]
    Unwritable(#[from] mqttbytes::Error),
}

impl ConnectionError {
    /// All labels of [`ConnectionError::label`].
    pub const LABELS: [&str; 12] = [
        "network",
        "closed",
        "timeout",
        "not_mqtt",
        "refused",
        "unusable",
        "not_subscribed",
        "taken_over",
        "disconnected",
        "packet_too_large",
        "still_dealt",
        "protocol",
    ];

    /// For the metric.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(_) => "network",
            Self::Closed => "closed",
            Self::Timeout(_) => "timeout",
            Self::NotMqtt(_) => "not_mqtt",
            Self::Refused(_) => "refused",
            Self::Unusable(_) => "unusable",
            Self::NotSubscribed(_) => "not_subscribed",
            Self::TakenOver(_) => "taken_over",
            Self::Disconnected(_) => "disconnected",
            Self::Packet(PacketError::TooLarge { .. }) => "packet_too_large",
            Self::StillDealt => "still_dealt",
            Self::Packet(_) | Self::Unexpected(_) | Self::Unwritable(_) => "protocol",
        }
    }
}
