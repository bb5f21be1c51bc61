//! What a source hands in and what it gets back.

use bytes::Bytes;
use tokio::time::Instant;

use crate::letter_limit::Admissions;

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
    /// Bytes that topic and payload hold in memory: of all they are slices of, their share. More than their own length when
    /// the source's packet had other parts (MQTT 5 properties), which stay in memory as long as they do.
    pub held: usize,
    /// The source could not read the message, for this reason; the payload is the packet as it came. It becomes a dead
    /// letter.
    pub malformed: Option<&'static str>,
    /// What was decided about its dead letters, if it has any.
    pub admissions: Option<Box<Admissions>>,
}

impl Delivery {
    /// A message that holds nothing but its topic and its payload.
    #[must_use]
    pub fn new(topic: Bytes, payload: Bytes, ack: Option<Ack>, received: Instant) -> Self {
        let held = topic.len() + payload.len();
        Self { topic, payload, ack, received, held, malformed: None, admissions: None }
    }

    /// Bytes this message holds in memory while it waits.
    #[must_use]
    pub fn size(&self) -> usize {
        self.held + size_of::<Self>()
    }
}
