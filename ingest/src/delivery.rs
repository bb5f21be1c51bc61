//! What a source hands in and what it gets back.

use bytes::Bytes;
use tokio::time::Instant;

/// The right to settle one broker message, once. Not `Clone`; dropping it settles nothing, so the broker delivers
/// the message again.
#[must_use = "a message whose Ack is dropped is delivered again"]
#[derive(Debug, PartialEq, Eq)]
pub struct Ack {
    /// Which connection of the source the message came over. An older one's acknowledgements are void.
    pub connection: u32,
    /// The broker's number for the message on that connection (MQTT packet id, AMQP delivery tag).
    pub id: u64,
}

/// One broker message.
#[derive(Debug)]
pub struct Delivery {
    /// MQTT topic or AMQP routing key, as received.
    pub topic: Bytes,
    pub payload: Bytes,
    /// `None` when the broker wants no answer (MQTT QoS 0).
    pub ack: Option<Ack>,
    pub received: Instant,
}

impl Delivery {
    /// Bytes this message holds in memory while it waits.
    #[must_use]
    pub fn size(&self) -> usize {
        self.topic.len() + self.payload.len() + size_of::<Self>()
    }
}
