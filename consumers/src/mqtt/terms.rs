//! What the broker grants in CONNACK, judged: used, warned of, or refused with what to do.

use std::time::Duration;

use super::error::ConnectionError;
use super::packet::ConnAck;
use super::reason::{About, explain, name_3};

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub client_id: &'a str,
    pub filter: &'a str,
    pub session_expiry: Duration,
    pub keep_alive: Duration,
}

/// What holds on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The broker had kept a session for us.
    pub session_present: bool,
    /// How long the broker keeps the session while we are away.
    pub session_expiry: Duration,
    /// The broker keeps the session for a shorter time than asked.
    pub is_expiry_shortened: bool,
    /// Longest silence of ours.
    pub keep_alive: Duration,
    /// Largest packet that the broker takes.
    pub max_outgoing: usize,
}

impl Terms {
    /// Before the broker has answered.
    pub(super) fn of(asked: &Asked<'_>) -> Self {
        Self {
            session_present: false,
            session_expiry: asked.session_expiry,
            is_expiry_shortened: false,
            keep_alive: asked.keep_alive,
            max_outgoing: usize::MAX,
        }
    }
}

/// Judges the broker's answer to CONNECT.
///
/// # Errors
/// [`ConnectionError::Refused`] when the broker refuses, [`ConnectionError::Unusable`] when what it grants would lose
/// readings or leave the subscription without effect.
pub fn judge(connack: &ConnAck, asked: &Asked<'_>) -> Result<Terms, ConnectionError> {
    if connack.is_version_3 {
        let name = name_3(connack.reason);
        return Err(ConnectionError::Refused(format!(
            "it answers in MQTT 3.1.1 ({name}, code {}). This consumer needs MQTT 5: use a broker that speaks it (Mosquitto \
             from 1.6 on), and a listener that allows it",
            connack.reason
        )));
    }
    if connack.reason != 0 {
        let (text, server) = (connack.reason_string.as_deref(), connack.server_reference.as_deref());
        return Err(ConnectionError::Refused(explain(About::Connection, connack.reason, text, server)));
    }
    if let Some(problem) = unusable(connack, asked) {
        return Err(ConnectionError::Unusable(problem));
    }
    let session_expiry = match connack.session_expiry {
        // All ones: it never expires.
        Some(seconds) => Duration::from_secs(seconds.into()),
        None => asked.session_expiry,
    };
    let keep_alive = match connack.server_keep_alive {
        // 0: the broker does not look. We still do.
        None | Some(0) => asked.keep_alive,
        // A longer one allows more silence and asks for none.
        Some(seconds) => Duration::from_secs(seconds.into()).min(asked.keep_alive),
    };
    Ok(Terms {
        session_present: connack.session_present,
        session_expiry,
        is_expiry_shortened: session_expiry < asked.session_expiry,
        keep_alive,
        max_outgoing: connack
            .maximum_packet_size
            .map_or(usize::MAX, |size| usize::try_from(size).unwrap_or(usize::MAX)),
    })
}

fn unusable(connack: &ConnAck, asked: &Asked<'_>) -> Option<String> {
    if connack.maximum_qos == 0 {
        return Some(
            "its maximum QoS is 0, so no reading could be acknowledged, and readings would be lost. Raise the broker's maximum \
             QoS to 1 (Mosquitto: max_qos)"
                .into(),
        );
    }
    if connack.session_expiry == Some(0) {
        return Some(
            "it would forget the session, and the readings that wait in it, when the connection ends (Session Expiry Interval \
             0). Allow sessions that outlive a connection at the broker"
                .into(),
        );
    }
    if let Some(assigned) = connack.assigned_client_id.as_deref().filter(|id| *id != asked.client_id) {
        return Some(format!(
            "it gave this client another client id ({assigned}), so the session of {} would not be found again. Switch \
             client ids made by the broker off",
            asked.client_id
        ));
    }
    let is_shared = asked.filter.starts_with("$share/");
    if is_shared && !connack.shared_subscriptions {
        return Some(format!(
            "it has no shared subscriptions, and mqtt_consumer.filter is {}. Run one consumer with a filter without $share, or \
             use another broker",
            asked.filter
        ));
    }
    if asked.filter.contains(['+', '#']) && !connack.wildcard_subscriptions {
        return Some(format!(
            "it has no wildcard subscriptions, and mqtt_consumer.filter is {}",
            asked.filter
        ));
    }
    if connack.maximum_packet_size == Some(0) {
        return Some("its Maximum Packet Size is 0, which MQTT does not allow".into());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::packet::{Incoming, parse};
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn judged(filter: &str, bytes: &[u8]) -> Result<Terms, ConnectionError> {
        let Ok(Some(Incoming::ConnAck(connack))) = parse(&mut bytes.into(), 1024) else {
            panic!("{bytes:x?} is no CONNACK")
        };
        let asked = Asked {
            client_id: "consumer",
            filter,
            session_expiry: HOUR,
            keep_alive: Duration::from_secs(30),
        };
        judge(&connack, &asked)
    }

    /// CONNACK, success, with these properties.
    fn granted(properties: &[u8]) -> Vec<u8> {
        let length = u8::try_from(properties.len()).unwrap();
        [&[0x20, 3 + length, 0, 0, length], properties].concat()
    }

    #[test]
    fn what_the_broker_grants_is_used() {
        let plain = judged("og/#", &[0x20, 3, 1, 0, 0]).unwrap();
        assert!(plain.session_present && !plain.is_expiry_shortened);
        assert_eq!((plain.session_expiry, plain.keep_alive), (HOUR, Duration::from_secs(30)));
        for (properties, keep_alive, expiry, shortened) in [
            (&[0x13, 0, 4][..], 4, 3600, false),
            // Longer than ours, and none at all: ours.
            (&[0x13, 0xff, 0xff], 30, 3600, false),
            (&[0x13, 0, 0], 30, 3600, false),
            (&[0x11, 0, 0, 0, 60], 30, 60, true),
            (&[0x11, 0xff, 0xff, 0xff, 0xff], 30, 0xffff_ffff, false),
            // Everything that changes nothing: receive maximum, QoS 1, no retain, topic aliases, user property,
            // no subscription identifiers, the same client id.
            (
                b"\x21\0\x14\x24\x01\x25\0\x22\0\x0a\x26\0\x01a\0\x01b\x29\0\x12\0\x08consumer",
                30,
                3600,
                false,
            ),
        ] {
            let terms = judged("og/#", &granted(properties)).unwrap();
            assert_eq!(terms.keep_alive, Duration::from_secs(keep_alive), "{properties:x?}");
            assert_eq!(terms.session_expiry, Duration::from_secs(expiry), "{properties:x?}");
            assert_eq!(terms.is_expiry_shortened, shortened, "{properties:x?}");
        }
        assert_eq!(judged("og/#", &granted(&[0x27, 0, 0, 1, 0])).unwrap().max_outgoing, 256);
    }

    #[test]
    fn what_would_lose_readings_is_refused_with_what_to_do() {
        for (filter, bytes, words) in [
            ("og/#", granted(&[0x24, 0]), "max_qos"),
            ("og/#", granted(&[0x11, 0, 0, 0, 0]), "Session Expiry Interval 0"),
            ("og/#", granted(b"\x12\0\x04auto"), "another client id (auto)"),
            ("$share/a/og", granted(&[0x2a, 0]), "no shared subscriptions"),
            ("og/#", granted(&[0x28, 0]), "no wildcard subscriptions"),
            ("og/#", granted(&[0x27, 0, 0, 0, 0]), "Maximum Packet Size is 0"),
            ("og/#", vec![0x20, 2, 0, 1], "MQTT 3.1.1 (unacceptable protocol version, code 1)"),
            // Accepted, but in the old form: it does not know what a session expiry is.
            ("og/#", vec![0x20, 2, 0, 0], "needs MQTT 5"),
            ("og/#", vec![0x20, 2, 0, 0x84], "does not speak MQTT 5"),
            ("og/#", vec![0x20, 3, 0, 0x86, 0], "mqtt.username"),
            ("og/#", vec![0x20, 3, 0, 0x87, 0], "not authorized (reason 0x87)"),
            ("og/#", vec![0x20, 3, 0, 0x42, 0], "a reason that MQTT 5 does not know"),
            ("og/#", b"\x20\x09\0\x9c\x06\x1c\0\x03b:1".to_vec(), "names another server: b:1"),
            ("og/#", b"\x20\x0a\0\x97\x07\x1f\0\x04f\nll".to_vec(), "the broker says: f\u{fffd}ll"),
        ] {
            let said = judged(filter, &bytes).unwrap_err().to_string();
            assert!(said.contains(words), "{bytes:x?}: {said}");
        }
        // A filter that needs neither is not refused for want of them.
        judged("og/field", &granted(&[0x28, 0, 0x2a, 0])).unwrap();
    }
}
