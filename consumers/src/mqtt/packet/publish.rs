//! PUBLISH: the hot path.

use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};

use super::fields::Fields;
use super::properties::{Properties, TOPIC_ALIAS};
use super::{Incoming, PacketError};

/// How a message is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qos {
    AtMostOnce,
    AtLeastOnce,
    ExactlyOnce,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    pub topic: Bytes,
    pub payload: Bytes,
    pub qos: Qos,
    /// 0 at QoS 0.
    pub packet_id: u16,
    /// Bytes of the whole packet: what topic and payload, as slices of it, hold in memory.
    pub size: usize,
}

/// A message that cannot be read, save for its packet id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Poison {
    pub topic: Bytes,
    /// The packet from its first byte on.
    pub packet: Bytes,
    pub qos: Qos,
    pub packet_id: u16,
    pub problem: &'static str,
}

/// Takes the PUBLISH out of the buffer's front. `body` is behind its length.
pub(super) fn read(buffer: &mut BytesMut, first: u8, body: Range<usize>) -> Result<Incoming, PacketError> {
    let end = body.end;
    match message(buffer, first, body) {
        // Its frame is whole, so the packets behind it can be read.
        Err(PacketError::Malformed { what, .. }) => {
            buffer.advance(end);
            Ok(Incoming::Unanswerable(what))
        }
        read => read,
    }
}

fn message(buffer: &mut BytesMut, first: u8, body: Range<usize>) -> Result<Incoming, PacketError> {
    let bytes = buffer.get(body.clone()).unwrap_or_default();
    let mut fields = Fields::new("PUBLISH", bytes);
    let qos = match first >> 1 & 3 {
        0 => Qos::AtMostOnce,
        1 => Qos::AtLeastOnce,
        2 => Qos::ExactlyOnce,
        _ => return Err(fields.malformed("its QoS is 3")),
    };
    let topic = fields.bytes("its topic is longer than the packet")?;
    let topic = body.start + 2..body.start + 2 + topic.len();
    let packet_id = match qos {
        Qos::AtMostOnce => 0,
        Qos::AtLeastOnce | Qos::ExactlyOnce => fields.two("it has no packet id")?,
    };
    if packet_id == 0 && qos != Qos::AtMostOnce {
        return Err(fields.malformed("its packet id is 0"));
    }
    // What is inside the block of properties does not matter here, so it is not looked at: it can neither cost anything
    // nor be wrong. An alias would matter; it stands for an empty topic.
    let block = fields.clone();
    let problem = match skip_properties(&mut fields) {
        Err(_) => Some("its properties are longer than the packet"),
        Ok(()) if topic.is_empty() => {
            if has_alias(block) {
                return Err(PacketError::Unexpected("a topic alias, which this client does not allow"));
            }
            Some("its topic is empty")
        }
        Ok(()) => None,
    };
    let payload = body.end - fields.rest().len();
    let mut packet = buffer.split_to(body.end).freeze();
    let topic = packet.slice(topic);
    if let Some(problem) = problem {
        return Ok(Incoming::Poison(Poison { topic, packet, qos, packet_id, problem }));
    }
    packet.advance(payload);
    Ok(Incoming::Publish(Publish { topic, payload: packet, qos, packet_id, size: body.end }))
}

fn skip_properties(fields: &mut Fields<'_>) -> Result<(), PacketError> {
    const CUT: &str = "its properties are longer than the packet";
    let length = fields.variable(CUT)?;
    fields.take(usize::try_from(length).unwrap_or(usize::MAX), CUT)?;
    Ok(())
}

fn has_alias(mut fields: Fields<'_>) -> bool {
    let Ok(mut properties) = Properties::begin("PUBLISH", &mut fields) else { return false };
    while let Ok(Some((id, _))) = properties.next() {
        if id == TOPIC_ALIAS {
            return true;
        }
    }
    false
}
