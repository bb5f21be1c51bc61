//! The few MQTT 5 packets a publisher needs. Bytes in, bytes out; no socket.
//!
//! Rare packets go through rumqttc's codec. The two that make up all the traffic, PUBLISH out and PUBACK in, are
//! written and read here, without an allocation. Why rumqttc's event loop is not used: it makes one system call
//! for every PUBLISH and wakes for every PUBACK (see docs/decisions/0004-device-simulator-connection.md).

use std::time::Duration;

use bytes::BytesMut;
use rumqttc::v5::mqttbytes::Error;
use rumqttc::v5::mqttbytes::v5::{ConnAck, Connect, ConnectReturnCode, Login, Packet};

/// Nothing a broker sends a publisher is larger: acknowledgements, at most with a reason text.
pub const MAX_INCOMING: u32 = 64 << 10;

pub const PINGREQ: [u8; 2] = [0xc0, 0];
pub const DISCONNECT: [u8; 2] = [0xe0, 0];

/// What the broker may send on an open connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// `reason` as in MQTT 5, table 3-4.
    PubAck {
        packet_id: u16,
        reason: u8,
    },
    PingResp,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    #[error("the broker refuses the connection: {0:?}")]
    Refused(ConnectReturnCode),
    #[error("the broker disconnects: {0}")]
    Disconnected(&'static str),
    #[error("unexpected packet from the broker: {0}")]
    Unexpected(String),
    #[error("malformed packet from the broker: {0}")]
    Malformed(String),
}

/// What the broker allows on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Publishes without an answer at a time.
    pub receive_maximum: u16,
    /// Bytes of the largest packet it takes.
    pub packet_size: u32,
    /// Highest quality of service it takes.
    pub qos: u8,
    /// Overrules the keep-alive the client asked for.
    pub keep_alive: Option<Duration>,
}

/// A CONNECT with a clean start and no session: after a lost connection the simulator itself sends again what
/// was not acknowledged, so the broker need not remember anything, and no stale session can answer for us.
pub fn connect(client_id: &str, keep_alive: Duration, login: Option<(&str, &str)>) -> Vec<u8> {
    let connect = Connect {
        keep_alive: u16::try_from(keep_alive.as_secs()).unwrap_or(u16::MAX),
        client_id: client_id.to_owned(),
        clean_start: true,
        properties: None,
    };
    let login =
        login.map(|(username, password)| Login { username: username.into(), password: password.into() });
    let mut out = BytesMut::new();
    // Fails only for packets above the limit given, and none is.
    drop(Packet::Connect(connect, None, login).write(&mut out, None));
    out.to_vec()
}

/// Reads a CONNACK from the front of `inbox`; `None`: not all of it is there.
pub fn connack(inbox: &mut BytesMut) -> Result<Option<Limits>, ProtocolError> {
    match read(inbox)? {
        None => Ok(None),
        Some(Packet::ConnAck(ConnAck { code: ConnectReturnCode::Success, properties, .. })) => {
            let properties = properties.as_ref();
            Ok(Some(Limits {
                receive_maximum: properties.and_then(|p| p.receive_max).unwrap_or(u16::MAX),
                packet_size: properties.and_then(|p| p.max_packet_size).unwrap_or(u32::MAX),
                qos: properties.and_then(|p| p.max_qos).unwrap_or(2),
                keep_alive: properties
                    .and_then(|p| p.server_keep_alive)
                    .map(|seconds| Duration::from_secs(seconds.into())),
            }))
        }
        Some(Packet::ConnAck(connack)) => Err(ProtocolError::Refused(connack.code)),
        Some(other) => Err(ProtocolError::Unexpected(format!("{other:?}"))),
    }
}

/// Reads the packet at the front of `inbox`: what it is and its length. `None`: not all of it is there.
pub fn answer(inbox: &[u8]) -> Result<Option<(Answer, usize)>, ProtocolError> {
    match *inbox {
        [0x40, 2, high, low, ..] => {
            Ok(Some((Answer::PubAck { packet_id: u16::from_be_bytes([high, low]), reason: 0 }, 4)))
        }
        // With a reason, and from 4 bytes on with properties, which are not needed.
        [0x40, length @ 3..=127, high, low, reason, ..] => {
            let length = usize::from(length) + 2;
            let packet_id = u16::from_be_bytes([high, low]);
            Ok((inbox.len() >= length).then_some((Answer::PubAck { packet_id, reason }, length)))
        }
        [0xd0, 0, ..] => Ok(Some((Answer::PingResp, 2))),
        // rumqttc's codec refuses the short forms that brokers send.
        [0xe0, 0, ..] => Err(ProtocolError::Disconnected("without a reason")),
        [0xe0, 1..=127, reason, ..] => Err(ProtocolError::Disconnected(disconnect_reason(reason))),
        [0xe0, ..] => Ok(None),
        [] | [_] => Ok(None),
        _ => {
            let mut copy = BytesMut::from(inbox);
            let whole = copy.len();
            match read(&mut copy)? {
                None => Ok(None),
                Some(Packet::PubAck(ack)) => {
                    // A reason text made it long; the codec has no number for the reason, but it is the fifth byte
                    // after the two of the id, whose place the length's own size decides.
                    let length = whole - copy.len();
                    let reason = inbox.iter().skip(1).skip_while(|byte| **byte > 127).nth(3);
                    let reason = reason.copied().unwrap_or(0);
                    Ok(Some((Answer::PubAck { packet_id: ack.pkid, reason }, length)))
                }
                Some(other) => Err(ProtocolError::Unexpected(format!("{other:?}"))),
            }
        }
    }
}

fn read(inbox: &mut BytesMut) -> Result<Option<Packet>, ProtocolError> {
    match Packet::read(inbox, Some(MAX_INCOMING)) {
        Ok(packet) => Ok(Some(packet)),
        Err(Error::InsufficientBytes(_)) => Ok(None),
        Err(error) => Err(ProtocolError::Malformed(error.to_string())),
    }
}

/// Bytes of a PUBLISH.
#[must_use]
pub fn publish_size(qos: u8, topic: &[u8], payload: &[u8]) -> usize {
    let remaining = remaining(qos, topic, payload);
    1 + if remaining < 128 {
        1
    } else if remaining < 16_384 {
        2
    } else if remaining < 2_097_152 {
        3
    } else {
        4
    } + remaining
}

/// Appends a PUBLISH. The packet id is used at QoS 1 only; the payload stays below 256 MB.
pub fn publish(out: &mut Vec<u8>, qos: u8, packet_id: u16, topic: &[u8], payload: &[u8]) {
    out.push(0x30 | qos << 1);
    let mut remaining = remaining(qos, topic, payload);
    loop {
        let low = (remaining & 0x7f) as u8;
        remaining >>= 7;
        if remaining == 0 {
            out.push(low);
            break;
        }
        out.push(low | 0x80);
    }
    out.extend_from_slice(&u16::try_from(topic.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(topic);
    if qos > 0 {
        out.extend_from_slice(&packet_id.to_be_bytes());
    }
    out.push(0);
    out.extend_from_slice(payload);
}

fn remaining(qos: u8, topic: &[u8], payload: &[u8]) -> usize {
    2 + topic.len() + if qos > 0 { 2 } else { 0 } + 1 + payload.len()
}

/// The name of a PUBACK's reason, for a metric's label.
#[must_use]
pub fn reason(code: u8) -> &'static str {
    match code {
        0x00 => "success",
        0x10 => "no_matching_subscribers",
        0x80 => "unspecified_error",
        0x83 => "implementation_specific_error",
        0x87 => "not_authorized",
        0x90 => "topic_name_invalid",
        0x91 => "packet_identifier_in_use",
        0x97 => "quota_exceeded",
        0x99 => "payload_format_invalid",
        _ => "unknown_reason",
    }
}

/// The words for a DISCONNECT's reason.
fn disconnect_reason(code: u8) -> &'static str {
    match code {
        0x00 => "normal disconnection",
        0x80 => "unspecified error",
        0x81 => "malformed packet",
        0x82 => "protocol error",
        0x87 => "not authorized",
        0x89 => "server busy",
        0x8b => "server shutting down",
        0x8d => "keep alive timeout",
        0x8e => "session taken over by another client with this id",
        0x93 => "receive maximum exceeded",
        0x95 => "packet too large",
        0x97 => "quota exceeded",
        0x98 => "administrative action",
        _ => "a reason unknown to this client",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rumqttc::v5::mqttbytes::QoS;
    use rumqttc::v5::mqttbytes::v5::{ConnAckProperties, PingResp, PubAck, PubAckProperties, PubAckReason};

    fn encoded(packet: &Packet) -> BytesMut {
        let mut out = BytesMut::new();
        packet.write(&mut out, None).unwrap();
        out
    }

    #[test]
    fn a_publish_is_what_rumqttc_reads() {
        for qos in [0, 1] {
            for size in [0, 1, 90, 100, 127, 128, 400, 16_300, 16_400, 2_097_200] {
                let payload = vec![b'x'; size];
                let mut out = Vec::new();
                publish(&mut out, qos, 515, b"og/field/a/b/c", &payload);
                assert_eq!(out.len(), publish_size(qos, b"og/field/a/b/c", &payload), "{size}");
                let mut bytes = BytesMut::from(&out[..]);
                let Packet::Publish(read) = Packet::read(&mut bytes, None).unwrap() else { panic!("{size}") };
                assert!(bytes.is_empty());
                assert_eq!(read.topic, "og/field/a/b/c");
                assert_eq!(read.payload, payload);
                assert_eq!((read.qos == QoS::AtLeastOnce, read.dup, read.retain), (qos == 1, false, false));
                assert_eq!(read.pkid, if qos == 1 { 515 } else { 0 });
            }
        }
    }

    #[test]
    fn acknowledgements_are_read_with_and_without_reason_and_in_pieces() {
        let long = PubAckProperties { reason_string: Some("x".repeat(300)), user_properties: Vec::new() };
        let short = PubAckProperties { reason_string: Some("quota".into()), user_properties: Vec::new() };
        for (reason, properties, code) in [
            (PubAckReason::Success, None, 0),
            (PubAckReason::NoMatchingSubscribers, None, 0x10),
            (PubAckReason::QuotaExceeded, Some(short), 0x97),
            (PubAckReason::NotAuthorized, Some(long), 0x87),
        ] {
            let mut ack = PubAck::new(770, properties);
            ack.reason = reason;
            let bytes = encoded(&Packet::PubAck(ack));
            for end in 0..bytes.len() {
                assert_eq!(answer(&bytes[..end]), Ok(None), "{end} of {}", bytes.len());
            }
            let mut followed = bytes.to_vec();
            followed.extend_from_slice(&[0x40, 2]);
            assert_eq!(
                answer(&followed),
                Ok(Some((Answer::PubAck { packet_id: 770, reason: code }, bytes.len())))
            );
        }
        assert_eq!(answer(&encoded(&Packet::PingResp(PingResp))), Ok(Some((Answer::PingResp, 2))));
    }

    #[test]
    fn a_disconnect_and_nonsense_end_the_connection() {
        assert_eq!(answer(&[0xe0, 1, 0x8b]), Err(ProtocolError::Disconnected("server shutting down")));
        assert_eq!(answer(&[0xe0, 2, 0x8b, 0]), Err(ProtocolError::Disconnected("server shutting down")));
        assert_eq!(answer(&[0xe0, 1]), Ok(None));
        assert_eq!(answer(&DISCONNECT), Err(ProtocolError::Disconnected("without a reason")));
        assert!(answer(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_err());
        assert!(answer(&[0x90, 3, 0, 1, 0]).is_err());
    }

    #[test]
    fn connect_is_clean_and_the_brokers_limits_are_kept() {
        let mut bytes = BytesMut::from(&connect("sim-1", Duration::from_secs(30), Some(("u", "p")))[..]);
        let Packet::Connect(read, None, Some(login)) = Packet::read(&mut bytes, None).unwrap() else {
            panic!()
        };
        assert_eq!((read.client_id.as_str(), read.keep_alive, read.clean_start), ("sim-1", 30, true));
        assert_eq!((login.username.as_str(), login.password.as_str()), ("u", "p"));

        let mut plain =
            ConnAck { session_present: false, code: ConnectReturnCode::Success, properties: None };
        let mut bytes = encoded(&Packet::ConnAck(plain.clone()));
        let unlimited = Limits { receive_maximum: u16::MAX, packet_size: u32::MAX, qos: 2, keep_alive: None };
        assert_eq!(connack(&mut bytes), Ok(Some(unlimited)));
        // No type of rumqttc's builds these; the broker's own bytes: Receive Maximum 20, Maximum Packet Size 1000,
        // Maximum QoS 0, Server Keep Alive 5.
        let limited = [0x20, 16, 0, 0, 13, 0x21, 0, 20, 0x27, 0, 0, 0x03, 0xe8, 0x24, 0, 0x13, 0, 5];
        assert_eq!(connack(&mut BytesMut::from(&limited[..8])), Ok(None));
        let read = connack(&mut BytesMut::from(&limited[..]));
        assert_eq!(
            read,
            Ok(Some(Limits {
                receive_maximum: 20,
                packet_size: 1000,
                qos: 0,
                keep_alive: Some(Duration::from_secs(5)),
            }))
        );
        plain.code = ConnectReturnCode::NotAuthorized;
        plain.properties = None::<ConnAckProperties>;
        let refused = connack(&mut encoded(&Packet::ConnAck(plain)));
        assert_eq!(refused, Err(ProtocolError::Refused(ConnectReturnCode::NotAuthorized)));
    }
}
