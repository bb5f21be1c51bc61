//! CONNACK: what the broker grants.

use super::PacketError;
use super::fields::Fields;
use super::properties::{
    ASSIGNED_CLIENT_IDENTIFIER, MAXIMUM_PACKET_SIZE, MAXIMUM_QOS, Properties, REASON_STRING,
    SERVER_KEEP_ALIVE, SERVER_REFERENCE, SESSION_EXPIRY_INTERVAL, SHARED_SUBSCRIPTION_AVAILABLE,
    WILDCARD_SUBSCRIPTION_AVAILABLE,
};

/// The answer to CONNECT. `None`: the broker says nothing of it, and MQTT's default holds.
///
/// Left out is what changes nothing for a client that publishes one message at a time, retains none, and uses neither
/// subscription identifiers nor topic aliases: Receive Maximum, Retain Available, Subscription Identifiers Available,
/// Topic Alias Maximum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnAck {
    /// The broker had kept a session for this client id.
    pub session_present: bool,
    /// 0 is success.
    pub reason: u8,
    /// In the form of MQTT 3.1.1, without properties.
    pub is_version_3: bool,
    /// Seconds; the one asked for when the broker says nothing.
    pub session_expiry: Option<u32>,
    /// 2 when the broker says nothing.
    pub maximum_qos: u8,
    /// Bytes.
    pub maximum_packet_size: Option<u32>,
    pub assigned_client_id: Option<String>,
    pub reason_string: Option<String>,
    pub wildcard_subscriptions: bool,
    pub shared_subscriptions: bool,
    /// Seconds; the one asked for when the broker says nothing. 0 switches the broker's check off.
    pub server_keep_alive: Option<u16>,
    pub server_reference: Option<String>,
}

pub(super) fn read(body: &[u8]) -> Result<ConnAck, PacketError> {
    let mut fields = Fields::new("CONNACK", body);
    let flags = fields.byte("it has no flags")?;
    if flags > 1 {
        return Err(fields.malformed("its reserved flags are set"));
    }
    let mut connack = ConnAck {
        session_present: flags == 1,
        reason: fields.byte("it has no reason")?,
        is_version_3: false,
        session_expiry: None,
        maximum_qos: 2,
        maximum_packet_size: None,
        assigned_client_id: None,
        reason_string: None,
        wildcard_subscriptions: true,
        shared_subscriptions: true,
        server_keep_alive: None,
        server_reference: None,
    };
    if fields.is_empty() {
        // A broker of MQTT 5 may leave empty properties out of a refusal, whose codes begin at 0x80.
        connack.is_version_3 = connack.reason < 0x80;
        return Ok(connack);
    }
    let mut properties = Properties::begin("CONNACK", &mut fields)?;
    while let Some((id, value)) = properties.next()? {
        match id {
            SESSION_EXPIRY_INTERVAL => connack.session_expiry = Some(value.number()),
            MAXIMUM_QOS => connack.maximum_qos = u8::try_from(value.number()).unwrap_or(u8::MAX),
            MAXIMUM_PACKET_SIZE => connack.maximum_packet_size = Some(value.number()),
            ASSIGNED_CLIENT_IDENTIFIER => connack.assigned_client_id = Some(value.shown()),
            REASON_STRING => connack.reason_string = Some(value.shown()),
            WILDCARD_SUBSCRIPTION_AVAILABLE => connack.wildcard_subscriptions = value.number() != 0,
            SHARED_SUBSCRIPTION_AVAILABLE => connack.shared_subscriptions = value.number() != 0,
            SERVER_KEEP_ALIVE => {
                connack.server_keep_alive = Some(u16::try_from(value.number()).unwrap_or(u16::MAX));
            }
            SERVER_REFERENCE => connack.server_reference = Some(value.shown()),
            _ => {}
        }
    }
    if !fields.is_empty() {
        return Err(fields.malformed("bytes follow its properties"));
    }
    Ok(connack)
}
