//! What answers on a port that is not an MQTT broker's, told by its first bytes.

/// What the bytes before any CONNACK say about who sent them. `None` while they may begin a CONNACK, or an MQTT packet
/// that the parser judges.
pub(super) fn not_mqtt(bytes: &[u8]) -> Option<String> {
    // The order matters: what may still become one of these beginnings is waited for, then it is none of them.
    let guess = match bytes {
        [] | [0x20, ..] => return None,
        // An alert or a handshake record.
        [0x15 | 0x16, 3, ..] => "it speaks TLS: set mqtt.port to the listener without TLS (usually 1883)",
        [b'H', b'T', b'T', b'P', b'/', ..] => {
            "it is an HTTP server: set mqtt.port to the broker's MQTT listener"
        }
        [b'A', b'M', b'Q', b'P', ..] => {
            "it speaks AMQP: set mqtt.port to the MQTT listener (RabbitMQ's AMQP port is 5672, MQTT usually 1883)"
        }
        [b'S', b'S', b'H', b'-', ..] => "it is an SSH server: check mqtt.host and mqtt.port",
        [b'-', b'E', b'R', b'R', ..] => "it looks like Redis: check mqtt.host and mqtt.port",
        [b'2', b'2', b'0', b' ' | b'-', ..] => {
            "it looks like a mail or FTP server: check mqtt.host and mqtt.port"
        }
        // Postgres' ErrorResponse; MySQL's greeting, after a length of three bytes and number 0.
        [b'E', 0, ..] => "it looks like Postgres: check mqtt.host and mqtt.port",
        [_, _, 0, 0, 9 | 10, ..] => "it looks like MySQL: check mqtt.host and mqtt.port",
        // DISCONNECT or AUTH before CONNACK: MQTT, but not in order. The parser says so.
        [0xe0 | 0xf0, ..] => return None,
        _ if may_become_known(bytes) => return None,
        _ => "check mqtt.host and mqtt.port",
    };
    Some(format!("no MQTT broker answers: the first bytes are {}; {guess}", shown(bytes)))
}

/// The broker closed before any CONNACK.
pub(super) const CLOSED: &str = "no MQTT broker answers: the server closed the connection without an answer. Check that mqtt.port is an MQTT listener without TLS; a \
     broker also does this when it has reached its limit of connections, or refuses this client by its access rules";

/// The rest of one of the beginnings above may be on its way.
fn may_become_known(bytes: &[u8]) -> bool {
    const BEGINNINGS: [&[u8]; 6] = [b"HTTP/", b"AMQP", b"SSH-", b"-ERR", &[0x15, 3], &[0x16, 3]];
    BEGINNINGS.iter().any(|beginning| beginning.starts_with(bytes))
}

fn shown(bytes: &[u8]) -> String {
    let head = bytes.get(..16).unwrap_or(bytes);
    format!("\"{}\"", head.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answers_is_told_by_the_first_bytes() {
        for (bytes, words) in [
            (&b"\x15\x03\x03\x00\x02\x02\x46"[..], "TLS"),
            (b"HTTP/1.1 400 Bad Request\r\n", "HTTP"),
            (b"AMQP\x00\x00\x09\x01", "AMQP"),
            (b"SSH-2.0-OpenSSH_9.2p1\r\n", "SSH"),
            (b"-ERR unknown command\r\n", "Redis"),
            (b"220 mail.example ESMTP\r\n", "mail"),
            (b"E\x00\x00\x00\x80SFATAL\x00", "Postgres"),
            (b"\x4a\x00\x00\x00\x0a8.0.36\x00", "MySQL"),
            (b"\x00\x01\x02\x03\x04", "\\x00\\x01\\x02"),
        ] {
            let said = not_mqtt(bytes).unwrap();
            assert!(said.contains(words), "{said}");
        }
        // CONNACK, DISCONNECT, and what may still become a known beginning.
        for bytes in [&b""[..], b"\x20", b"\x20\x03\x00", b"\xe0\x01\x8e", b"HTT", b"\x15", b"AMQ"] {
            assert_eq!(not_mqtt(bytes), None, "{bytes:?}");
        }
    }
}
