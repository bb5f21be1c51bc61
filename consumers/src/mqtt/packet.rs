//! MQTT 5 packets as a consumer receives them: bytes in, packets out. Opens no socket, reads no clock.
//!
//! A packet is read when its whole frame is there. A whole frame that lacks something inside is a [`PacketError`]; it is
//! never a reason to wait for more bytes. Topic and payload of a PUBLISH are slices of the buffer; the properties of a
//! PUBLISH are skipped as one block, so a packet costs no more memory than its own size, whatever it holds.

mod answers;
mod connack;
mod fields;
mod properties;
mod publish;

use std::ops::Range;

use bytes::{Buf, BytesMut};

pub use answers::{Disconnect, PubAck, SubAck, UnsubAck};
pub use connack::ConnAck;
pub use publish::{Poison, Publish, Qos};

/// What a broker sends to a consumer. Nearly every packet is a PUBLISH, so boxing it would only add an allocation per
/// message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "the large variant is the common one")]
pub enum Incoming {
    Publish(Publish),
    /// A PUBLISH that cannot be read, but whose packet id can: it can be acknowledged.
    Poison(Poison),
    /// A PUBLISH without a packet id that can be read, and why: it cannot be acknowledged, whatever is done.
    Unanswerable(&'static str),
    ConnAck(Box<ConnAck>),
    SubAck(SubAck),
    UnsubAck(UnsubAck),
    /// The answer to a message of ours.
    PubAck(PubAck),
    /// The broker releases this QoS 2 message; it waits for PUBCOMP.
    PubRel(u16),
    Pong,
    Disconnect(Disconnect),
}

/// The bytes are not what a broker may send. The connection cannot go on: where the next packet begins is not known, or
/// what it means is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    #[error(
        "the broker sent a packet of {size} bytes, more than the {max} it was told: mqtt_consumer.max_packet must be above it"
    )]
    TooLarge { size: usize, max: usize },
    #[error("the broker broke the MQTT protocol: {packet}: {what}")]
    Malformed { packet: &'static str, what: &'static str },
    #[error("the broker broke the MQTT protocol: it sent {0}")]
    Unexpected(&'static str),
}

/// Reads the packet at the front of `buffer` and takes it out. `None`: its frame is not complete; room for the rest is
/// reserved. `max_packet` is the largest frame in bytes.
///
/// # Errors
/// [`PacketError`]; the buffer is left as it is.
pub fn parse(buffer: &mut BytesMut, max_packet: usize) -> Result<Option<Incoming>, PacketError> {
    let Some((first, body)) = frame(buffer, max_packet)? else { return Ok(None) };
    if first >> 4 == PUBLISH {
        return publish::read(buffer, first, body).map(Some);
    }
    let length = body.end;
    let incoming = answers::read(first, buffer.get(body).unwrap_or_default())?;
    buffer.advance(length);
    Ok(Some(incoming))
}

const CONNACK: u8 = 2;
const PUBLISH: u8 = 3;
const PUBACK: u8 = 4;
const PUBREL: u8 = 6;
const SUBACK: u8 = 9;
const UNSUBACK: u8 = 11;
const PINGRESP: u8 = 13;
const DISCONNECT: u8 = 14;

/// The packet's first byte and where its body is, when all of it is there.
fn frame(buffer: &mut BytesMut, max_packet: usize) -> Result<Option<(u8, Range<usize>)>, PacketError> {
    let Some((&first, rest)) = buffer.split_first() else { return Ok(None) };
    // Known by the first byte alone: what is not for a consumer is not waited for.
    let packet = name(first)?;
    let mut remaining = 0;
    let mut start = 1;
    loop {
        let Some(&byte) = rest.get(start - 1) else { return Ok(None) };
        remaining |= usize::from(byte & 0x7f) << (7 * (start - 1));
        start += 1;
        if byte < 0x80 {
            break;
        }
        if start > 4 {
            return Err(PacketError::Malformed { packet, what: "its length has more than four bytes" });
        }
    }
    let size = start + remaining;
    if size > max_packet {
        return Err(PacketError::TooLarge { size, max: max_packet });
    }
    if buffer.len() < size {
        // What this packet lacks and no more: the connection starts the pieces. Asking for more here started a new piece
        // after each read, and a message of 450 bytes occupied 3 KB.
        let lacking = size - buffer.len();
        buffer.reserve(lacking);
        return Ok(None);
    }
    Ok(Some((first, start..size)))
}

/// What a first byte begins, if a consumer can be sent it.
fn name(first: u8) -> Result<&'static str, PacketError> {
    let (name, flags) = match first >> 4 {
        PUBLISH => return Ok("PUBLISH"),
        CONNACK => ("CONNACK", 0),
        PUBACK => ("PUBACK", 0),
        PUBREL => ("PUBREL", 2),
        SUBACK => ("SUBACK", 0),
        UNSUBACK => ("UNSUBACK", 0),
        PINGRESP => ("PINGRESP", 0),
        DISCONNECT => ("DISCONNECT", 0),
        1 => return Err(PacketError::Unexpected("CONNECT, which only a client sends")),
        5 => return Err(PacketError::Unexpected("PUBREC, which only a client sends")),
        7 => return Err(PacketError::Unexpected("PUBCOMP, which only a client sends")),
        8 => return Err(PacketError::Unexpected("SUBSCRIBE, which only a client sends")),
        10 => return Err(PacketError::Unexpected("UNSUBSCRIBE, which only a client sends")),
        12 => return Err(PacketError::Unexpected("PINGREQ, which only a client sends")),
        15 => return Err(PacketError::Unexpected("AUTH, for which nobody asked")),
        _ => return Err(PacketError::Unexpected("a packet of the reserved type 0")),
    };
    if first & 0x0f == flags {
        Ok(name)
    } else {
        Err(PacketError::Malformed { packet: name, what: "its reserved flags are set" })
    }
}

#[cfg(test)]
mod tests;
