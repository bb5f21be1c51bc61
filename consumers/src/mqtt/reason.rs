//! The broker's reason codes in words, and what to do about those that a person can do something about.

/// What was refused or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum About {
    Connection,
    Subscription,
    Disconnect,
}

/// A reason as a sentence: its name, its number, the broker's own text, what to do.
pub(super) fn explain(about: About, code: u8, text: Option<&str>, server: Option<&str>) -> String {
    let mut words = format!("{} (reason 0x{code:02x})", name(code));
    if let Some(text) = text {
        words.push_str(", the broker says: ");
        words.push_str(text);
    }
    if let Some(server) = server {
        words.push_str(&format!(
            ", the broker names another server: {server}; if it is yours, set mqtt.host and mqtt.port to it"
        ));
    }
    if let Some(advice) = advice(about, code) {
        words.push_str(". ");
        words.push_str(advice);
    }
    words
}

/// A code of MQTT 5, as the specification names it.
pub(super) fn name(code: u8) -> &'static str {
    match code {
        0x00 => "success",
        0x01 => "QoS 1 granted",
        0x02 => "QoS 2 granted",
        0x04 => "disconnected with the will message",
        0x10 => "no matching subscribers",
        0x11 => "no subscription existed",
        0x80 => "unspecified error",
        0x81 => "malformed packet",
        0x82 => "protocol error",
        0x83 => "implementation specific error",
        0x84 => "unsupported protocol version",
        0x85 => "client identifier not valid",
        0x86 => "bad user name or password",
        0x87 => "not authorized",
        0x88 => "server unavailable",
        0x89 => "server busy",
        0x8a => "banned",
        0x8b => "server shutting down",
        0x8c => "bad authentication method",
        0x8d => "keep alive timeout",
        0x8e => "session taken over",
        0x8f => "topic filter invalid",
        0x90 => "topic name invalid",
        0x91 => "packet identifier in use",
        0x92 => "packet identifier not found",
        0x93 => "receive maximum exceeded",
        0x94 => "topic alias invalid",
        0x95 => "packet too large",
        0x96 => "message rate too high",
        0x97 => "quota exceeded",
        0x98 => "administrative action",
        0x99 => "payload format invalid",
        0x9a => "retain not supported",
        0x9b => "QoS not supported",
        0x9c => "use another server",
        0x9d => "server moved",
        0x9e => "shared subscriptions not supported",
        0x9f => "connection rate exceeded",
        0xa0 => "maximum connect time",
        0xa1 => "subscription identifiers not supported",
        0xa2 => "wildcard subscriptions not supported",
        _ => "a reason that MQTT 5 does not know",
    }
}

/// What a broker of MQTT 3.1.1 answers to CONNECT.
pub(super) fn name_3(code: u8) -> &'static str {
    match code {
        0 => "accepted",
        1 => "unacceptable protocol version",
        2 => "identifier rejected",
        3 => "server unavailable",
        4 => "bad user name or password",
        5 => "not authorized",
        _ => "a reason that MQTT 3.1.1 does not know",
    }
}

fn advice(about: About, code: u8) -> Option<&'static str> {
    use About::{Connection, Disconnect, Subscription};
    Some(match (about, code) {
        (Connection, 0x84) => "The broker does not speak MQTT 5, which this consumer needs",
        (Connection, 0x85) => "Change mqtt_consumer.client_id, or allow it at the broker",
        (Connection, 0x86) => "Check mqtt.username and mqtt.password against the broker's password file",
        (Connection, 0x87) => {
            "Check mqtt.username, mqtt.password and mqtt_consumer.client_id against the broker's access rules"
        }
        (Connection, 0x8a) => "Somebody has banned this client at the broker",
        (Connection | Disconnect, 0x97) => "Raise the broker's limit of connections or sessions",
        (Connection | Disconnect, 0x9f) => "Raise the broker's limit of connections per second",
        (Subscription, 0x00) => {
            "At QoS 0 the broker would drop what is not yet committed. Raise the broker's maximum QoS to 1, also in its \
             access rules"
        }
        (Subscription, 0x80 | 0x87) => {
            "Allow this client to read mqtt_consumer.filter in the broker's access rules (ACL)"
        }
        (Subscription, 0x8f | 0xa2) => "mqtt_consumer.filter is not one that this broker takes",
        (Subscription, 0x9e) => {
            "Use a mqtt_consumer.filter without $share, or a broker that has shared subscriptions"
        }
        (Subscription, 0x97) => "Raise the broker's limit of subscriptions",
        (Disconnect, 0x81 | 0x82) => {
            "The broker did not understand this consumer; please report this with its version"
        }
        (Disconnect, 0x8d) => {
            "The broker heard nothing for 1.5 times the keep-alive: the network or this process stood still"
        }
        (Disconnect, 0x93) => "Lower mqtt_consumer.receive_maximum",
        (Disconnect, 0x95) => "The broker takes smaller packets than this consumer sends",
        (Disconnect, 0x98) => "Somebody has closed this connection at the broker",
        (Disconnect, 0x87) => {
            "The broker's access rules have changed: allow this client to connect and to read mqtt_consumer.filter"
        }
        _ => return None,
    })
}
