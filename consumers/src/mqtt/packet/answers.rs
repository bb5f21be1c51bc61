//! The small packets: answers to what the client sent, and the broker's farewell. Each in its short forms too, as brokers
//! really send them.

use super::fields::Fields;
use super::properties::{Properties, REASON_STRING, SERVER_REFERENCE};
use super::{
    CONNACK, DISCONNECT, Incoming, PINGRESP, PUBACK, PUBREL, PacketError, SUBACK, UNSUBACK, connack, name,
};

/// The answer to SUBSCRIBE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubAck {
    pub packet_id: u16,
    /// One for each filter.
    pub reasons: Vec<u8>,
    pub reason_string: Option<String>,
}

/// The answer to UNSUBSCRIBE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsubAck {
    pub packet_id: u16,
    /// One for each filter.
    pub reasons: Vec<u8>,
}

/// The answer to a message of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PubAck {
    pub packet_id: u16,
    pub reason: u8,
}

/// The broker ends the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disconnect {
    pub reason: u8,
    pub reason_string: Option<String>,
    pub server_reference: Option<String>,
}

/// More filters than this are never asked for in one packet.
const MAX_REASONS: usize = 16;

/// Reads every packet but PUBLISH.
pub(super) fn read(first: u8, body: &[u8]) -> Result<Incoming, PacketError> {
    let name = name(first)?;
    let mut fields = Fields::new(name, body);
    const NO_ID: &str = "it has no packet id";
    Ok(match first >> 4 {
        CONNACK => Incoming::ConnAck(Box::new(connack::read(body)?)),
        PUBACK => {
            let packet_id = fields.two(NO_ID)?;
            let (reason, ..) = reason(name, &mut fields)?;
            Incoming::PubAck(PubAck { packet_id, reason })
        }
        PUBREL => {
            let packet_id = fields.two(NO_ID)?;
            reason(name, &mut fields)?;
            Incoming::PubRel(packet_id)
        }
        SUBACK => {
            let (packet_id, reasons, reason_string) = reasons(name, &mut fields)?;
            Incoming::SubAck(SubAck { packet_id, reasons, reason_string })
        }
        UNSUBACK => {
            let (packet_id, reasons, _) = reasons(name, &mut fields)?;
            Incoming::UnsubAck(UnsubAck { packet_id, reasons })
        }
        PINGRESP if body.is_empty() => Incoming::Pong,
        DISCONNECT => {
            let (reason, reason_string, server_reference) = reason(name, &mut fields)?;
            Incoming::Disconnect(Disconnect { reason, reason_string, server_reference })
        }
        PINGRESP => return Err(fields.malformed("it is not empty")),
        _ => return Err(PacketError::Unexpected(name)),
    })
}

/// A reason and properties, both of which may be left out. Without a reason it is 0.
fn reason(
    packet: &'static str,
    fields: &mut Fields<'_>,
) -> Result<(u8, Option<String>, Option<String>), PacketError> {
    if fields.is_empty() {
        return Ok((0, None, None));
    }
    let reason = fields.byte("it has no reason")?;
    if fields.is_empty() {
        return Ok((reason, None, None));
    }
    let (mut text, mut server) = (None, None);
    let mut properties = Properties::begin(packet, fields)?;
    while let Some((id, value)) = properties.next()? {
        match id {
            REASON_STRING => text = Some(value.shown()),
            SERVER_REFERENCE => server = Some(value.shown()),
            _ => {}
        }
    }
    if !fields.is_empty() {
        return Err(fields.malformed("bytes follow its properties"));
    }
    Ok((reason, text, server))
}

fn reasons(
    packet: &'static str,
    fields: &mut Fields<'_>,
) -> Result<(u16, Vec<u8>, Option<String>), PacketError> {
    let packet_id = fields.two("it has no packet id")?;
    let mut text = None;
    let mut properties = Properties::begin(packet, fields)?;
    while let Some((id, value)) = properties.next()? {
        if id == REASON_STRING {
            text = Some(value.shown());
        }
    }
    let reasons = fields.rest();
    if reasons.is_empty() || reasons.len() > MAX_REASONS {
        return Err(fields.malformed("it does not have one reason for each filter"));
    }
    Ok((packet_id, reasons.to_vec(), text))
}
