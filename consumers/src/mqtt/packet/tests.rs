use bytes::BufMut;
use proptest::prelude::*;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish as TheirPublish, PublishProperties};
use rumqttc::v5::mqttbytes::{Error, QoS};

use super::*;

const MAX: usize = 4096;

fn one(bytes: &[u8]) -> Result<Option<Incoming>, PacketError> {
    parse(&mut BytesMut::from(bytes), MAX)
}

/// Everything up to the first error or the end, and what is left.
fn drain(buffer: &mut BytesMut, packets: &mut Vec<Incoming>) -> Option<PacketError> {
    loop {
        match parse(buffer, MAX) {
            Ok(Some(packet)) => packets.push(packet),
            Ok(None) => return None,
            Err(error) => return Some(error),
        }
    }
}

fn publish(topic: &[u8], qos: u8, id: u16, properties: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    body.put_u16(topic.len() as u16);
    body.put_slice(topic);
    if qos > 0 {
        body.put_u16(id);
    }
    length(&mut body, properties.len());
    body.put_slice(properties);
    body.put_slice(payload);
    frame_of(0x30 | qos << 1, &body)
}

fn frame_of(first: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    length(&mut bytes, body.len());
    bytes.put_slice(body);
    bytes
}

fn length(bytes: &mut Vec<u8>, mut length: usize) {
    while length >= 128 {
        bytes.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
}

#[test]
fn what_brokers_send_is_read_in_its_short_forms_too() {
    let disconnect = |reason: u8, text: Option<&str>, server: Option<&str>| {
        Incoming::Disconnect(Disconnect {
            reason,
            reason_string: text.map(str::to_owned),
            server_reference: server.map(str::to_owned),
        })
    };
    let puback = |packet_id, reason| Incoming::PubAck(PubAck { packet_id, reason });
    let cases: Vec<(&[u8], Incoming)> = vec![
        (&[0xd0, 0], Incoming::Pong),
        // Mosquitto's DISCONNECT: a reason without properties; and all other forms.
        (&[0xe0, 1, 0x8e], disconnect(0x8e, None, None)),
        (&[0xe0, 0], disconnect(0, None, None)),
        (&[0xe0, 2, 0x8b, 0], disconnect(0x8b, None, None)),
        (b"\xe0\x07\x97\x05\x1f\0\x02no", disconnect(0x97, Some("no"), None)),
        (b"\xe0\x0c\x9c\x0a\x1c\0\x01b\x26\0\x01k\0\0", disconnect(0x9c, None, Some("b"))),
        // A length in more bytes than it needs.
        (&[0xe0, 0x81, 0, 0x8e], disconnect(0x8e, None, None)),
        (&[0x40, 2, 0, 3], puback(3, 0)),
        (&[0x40, 3, 0, 3, 0x10], puback(3, 0x10)),
        (&[0x40, 4, 0, 3, 0x87, 0], puback(3, 0x87)),
        (b"\x40\x09\0\x03\x97\x05\x1f\0\x02no", puback(3, 0x97)),
        (&[0x62, 2, 1, 0], Incoming::PubRel(256)),
        (&[0x62, 3, 1, 0, 0x92], Incoming::PubRel(256)),
        (
            &[0x90, 4, 0, 1, 0, 0x87],
            Incoming::SubAck(SubAck { packet_id: 1, reasons: vec![0x87], reason_string: None }),
        ),
        (
            b"\x90\x09\0\x01\x05\x1f\0\x02no\x9e",
            Incoming::SubAck(SubAck { packet_id: 1, reasons: vec![0x9e], reason_string: Some("no".into()) }),
        ),
        (&[0xb0, 4, 0, 2, 0, 0x11], Incoming::UnsubAck(UnsubAck { packet_id: 2, reasons: vec![0x11] })),
    ];
    for (bytes, expected) in cases {
        assert_eq!(one(bytes), Ok(Some(expected)), "{bytes:x?}");
    }
}

#[test]
fn a_message_without_a_packet_id_is_skipped_and_the_next_is_read() {
    let cases: &[(&[u8], &str)] = &[
        (&[0x32, 0], "its topic is longer than the packet"),
        (&[0x32, 1, 0], "its topic is longer than the packet"),
        (&[0x32, 3, 0, 2, b't'], "its topic is longer than the packet"),
        (&[0x32, 3, 0, 1, b't'], "it has no packet id"),
        (&[0x32, 4, 0, 1, b't', 0], "it has no packet id"),
        (&[0x32, 6, 0, 1, b't', 0, 0, 0], "its packet id is 0"),
        (&[0x36, 6, 0, 1, b't', 0, 1, 0], "its QoS is 3"),
    ];
    for (bytes, problem) in cases {
        let mut buffer = BytesMut::from(&[*bytes, &[0xd0, 0]].concat()[..]);
        assert_eq!(parse(&mut buffer, 4096), Ok(Some(Incoming::Unanswerable(problem))), "{bytes:x?}");
        assert_eq!(parse(&mut buffer, 4096), Ok(Some(Incoming::Pong)), "{bytes:x?}");
    }
}

#[test]
fn a_whole_frame_that_lacks_something_is_an_error_and_nothing_is_waited_for() {
    let cases: &[(&[u8], &str)] = &[
        // Topic alias 5, with an empty topic.
        (&[0x32, 8, 0, 0, 0, 1, 3, 35, 0, 5], "it sent a topic alias, which this client does not allow"),
        (&[0x20, 0], "CONNACK: it has no flags"),
        (&[0x20, 1, 0], "CONNACK: it has no reason"),
        (&[0x20, 3, 2, 0, 0], "CONNACK: its reserved flags"),
        (&[0x20, 3, 0, 0, 9], "CONNACK: its properties are longer"),
        (&[0x20, 4, 0, 0, 0, 0], "CONNACK: bytes follow"),
        (&[0x20, 5, 0, 0, 2, 0x21, 0], "CONNACK: a property is longer"),
        (&[0x20, 4, 0, 0, 1, 99], "CONNACK: it has a property that MQTT 5 does not know"),
        (&[0x20, 7, 0, 0, 4, 0x24, 1, 0x24, 1], "CONNACK: it has a property twice"),
        (&[0x20, 7, 0, 0, 0xff, 0xff, 0xff, 0xff, 1], "CONNACK: its properties are longer"),
        (&[0x40, 0], "PUBACK: it has no packet id"),
        (&[0x40, 4, 0, 1, 0, 7], "PUBACK: its properties are longer"),
        (&[0x41, 2, 0, 1], "PUBACK: its reserved flags"),
        (&[0x60, 2, 0, 1], "PUBREL: its reserved flags"),
        (&[0x90, 2, 0, 1], "SUBACK: its properties are longer"),
        (&[0x90, 3, 0, 1, 0], "SUBACK: it does not have one reason"),
        (&[0xb0, 3, 0, 2, 0], "UNSUBACK: it does not have one reason"),
        (&[0xd0, 1, 0], "PINGRESP: it is not empty"),
        (&[0xe0, 2, 0, 5], "DISCONNECT: its properties are longer"),
        // Known before the frame is complete.
        (&[0x00], "reserved type 0"),
        (&[0x10], "it sent CONNECT"),
        (&[0xf0, 0], "it sent AUTH"),
        (&[0x50, 2, 0, 1], "it sent PUBREC"),
        (&[0x32, 0xff, 0xff, 0xff, 0xff], "PUBLISH: its length has more than four bytes"),
        (&[0x32, 0xff, 0x7f], "16386 bytes, more than the 4096"),
    ];
    for (bytes, words) in cases {
        // What follows must not be waited for, nor make good what is missing.
        for bytes in [bytes.to_vec(), [bytes, &[0_u8; 32][..]].concat()] {
            let said = one(&bytes).unwrap_err().to_string();
            assert!(said.contains(words), "{bytes:x?}: {said}");
        }
    }
}

#[test]
fn a_publish_that_cannot_be_read_can_still_be_acknowledged() {
    let good = publish(b"t", 1, 9, &[], b"{}");
    for (bytes, problem) in [
        // Its properties: none at all, longer than the packet, a length without an end.
        (frame_of(0x32, &[0, 1, b't', 0, 7]), "properties"),
        (frame_of(0x32, &[0, 1, b't', 0, 7, 200, 1, 0]), "properties"),
        (frame_of(0x3c, &[0, 1, b't', 0, 7, 0xff, 0xff, 0xff, 0xff, 0]), "properties"),
        (frame_of(0x32, &[0, 0, 0, 7, 0, b'{', b'}']), "topic is empty"),
    ] {
        let mut buffer = BytesMut::from([bytes.as_slice(), &good].concat().as_slice());
        let Ok(Some(Incoming::Poison(poison))) = parse(&mut buffer, MAX) else { panic!("{bytes:x?}") };
        assert_eq!((poison.packet_id, poison.packet.as_ref()), (7, bytes.as_slice()));
        assert!(poison.problem.contains(problem), "{}", poison.problem);
        // Its neighbour is untouched.
        assert!(matches!(parse(&mut buffer, MAX), Ok(Some(Incoming::Publish(next))) if next.packet_id == 9));
    }
}

#[test]
fn properties_of_a_publish_are_skipped_whatever_they_are() {
    // Unknown, cut, twice: nothing in the block is ours to judge, and its end is known.
    for properties in [&b"\x26\0\x01a\0\x01b"[..], &[99], &[8, 0], &[1, 0, 1, 0], &[11, 5, 11, 6]] {
        let bytes = publish(b"og/t", 1, 7, properties, b"payload");
        let Ok(Some(Incoming::Publish(publish))) = one(&bytes) else { panic!("{properties:x?}") };
        assert_eq!((publish.topic.as_ref(), publish.payload.as_ref()), (&b"og/t"[..], &b"payload"[..]));
        assert_eq!((publish.packet_id, publish.size), (7, bytes.len()));
    }
}

/// 16 MiB of user properties with empty names and values, five bytes each: 191 MB in a codec that collects them.
#[test]
fn millions_of_properties_cost_nothing() {
    let properties = [38, 0, 0, 0, 0].repeat((16 << 20) / 5);
    let bytes = publish(b"t", 1, 7, &properties, b"x");
    let mut buffer = BytesMut::from(bytes.as_slice());
    let capacity = buffer.capacity();
    let Ok(Some(Incoming::Publish(publish))) = parse(&mut buffer, 17 << 20) else { panic!("a PUBLISH") };
    // The same memory, and not a byte of it copied.
    assert_eq!((publish.payload.as_ref(), publish.size), (&b"x"[..], bytes.len()));
    assert!(capacity <= bytes.len() && buffer.capacity() <= capacity - bytes.len());
}

/// Whether the bytes begin with a whole frame; found without the parser.
fn begins_with_a_frame(bytes: &[u8]) -> bool {
    let mut remaining = 0;
    for (index, byte) in bytes.iter().skip(1).take(4).enumerate() {
        remaining |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return bytes.len() >= 2 + index + remaining;
        }
    }
    false
}

fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    let first = prop::sample::select(&[0x20, 0x30, 0x32, 0x34, 0x3b, 0x40, 0x62, 0x90, 0xb0, 0xd0, 0xe0][..]);
    let body = prop::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        4 => ("[a-z/]{1,9}", 0..3_u8, 1..9_u16, prop::collection::vec(any::<u8>(), 0..200), prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(topic, qos, id, properties, payload)| publish(topic.as_bytes(), qos, id, &properties, &payload)),
        2 => prop::sample::select(vec![
            vec![0xd0, 0], vec![0xe0, 1, 0x8e], vec![0x40, 2, 0, 3], vec![0x90, 4, 0, 1, 0, 1], vec![0x20, 3, 1, 0, 0],
        ]),
        2 => (first, body.clone()).prop_map(|(first, body)| frame_of(first, &body)),
        1 => body,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn bytes_cut_anywhere_are_the_same_packets_and_no_whole_frame_waits(
        packets in prop::collection::vec(any_packet(), 0..8),
        cuts in prop::collection::vec(1..64_usize, 1..200),
    ) {
        let bytes = packets.concat();
        let (mut whole, mut expected) = (BytesMut::from(bytes.as_slice()), Vec::new());
        let outcome = drain(&mut whole, &mut expected);
        if outcome.is_none() {
            prop_assert!(!begins_with_a_frame(&whole), "{:x?}", whole);
        }
        let (mut buffer, mut found, mut error) = (BytesMut::new(), Vec::new(), None);
        let mut rest = bytes.as_slice();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() || error.is_some() {
                break;
            }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            rest = later;
            buffer.extend_from_slice(now);
            error = drain(&mut buffer, &mut found);
            prop_assert!(error.is_some() || !begins_with_a_frame(&buffer));
            // Memory: one packet and what was read, whatever lengths the bytes claim.
            prop_assert!(buffer.capacity() <= 2 * (MAX + bytes.len()), "{}", buffer.capacity());
        }
        prop_assert_eq!(found, expected);
        prop_assert_eq!(error, outcome);
    }

    #[test]
    fn any_bytes_end_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut buffer = BytesMut::from(bytes.as_slice());
        let mut packets = Vec::new();
        if drain(&mut buffer, &mut packets).is_none() {
            prop_assert!(!begins_with_a_frame(&buffer));
        }
    }

    /// The reference: what rumqttc writes is read as it was meant.
    #[test]
    fn what_another_codec_writes_is_read(
        topic in "[a-z/]{1,60}",
        payload in prop::collection::vec(any::<u8>(), 0..600),
        qos in 0..3_u8,
        id in 1..u16::MAX,
        user in prop::collection::vec(("[a-z]{0,9}", "[a-z]{0,9}"), 0..9),
    ) {
        let level = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce][usize::from(qos)];
        let properties = PublishProperties {
            user_properties: user,
            content_type: Some("application/json".into()),
            correlation_data: Some(bytes::Bytes::from_static(b"c")),
            subscription_identifiers: vec![7, 300],
            ..PublishProperties::default()
        };
        let mut theirs = TheirPublish::new(topic.as_str(), level, payload.clone(), Some(properties));
        theirs.pkid = id;
        let mut bytes = BytesMut::new();
        theirs.write(&mut bytes).unwrap();
        let size = bytes.len();
        let Ok(Some(Incoming::Publish(ours))) = parse(&mut bytes, MAX) else { panic!("a PUBLISH") };
        prop_assert_eq!(ours.topic.as_ref(), topic.as_bytes());
        prop_assert_eq!(ours.payload.as_ref(), payload.as_slice());
        prop_assert_eq!((ours.packet_id, ours.size), (if qos == 0 { 0 } else { id }, size));
    }
}

/// `cargo test --release -p consumers --lib -- --ignored --nocapture nanoseconds`
#[test]
#[ignore = "a measurement, for a release build"]
fn nanoseconds_per_publish() {
    const MESSAGES: usize = 500;
    const ROUNDS: usize = 4_000;
    let message = publish(b"og/field/WY-ALPHA/turbine/WT-000017", 1, 7, &[], &[b'x'; 400]);
    let piece = message.repeat(MESSAGES);
    let theirs = |buffer: &mut BytesMut| match Packet::read(buffer, Some(17 << 20)) {
        Ok(Packet::Publish(publish)) => Some(publish.payload.len()),
        Ok(_) => None,
        Err(Error::InsufficientBytes(_)) => None,
        Err(error) => panic!("{error}"),
    };
    let ours = |buffer: &mut BytesMut| match parse(buffer, 17 << 20) {
        Ok(Some(Incoming::Publish(publish))) => Some(publish.payload.len()),
        _ => None,
    };
    let measure = |name: &str, read: &dyn Fn(&mut BytesMut) -> Option<usize>| {
        let mut spent = std::time::Duration::ZERO;
        for _ in 0..ROUNDS {
            let mut buffer = BytesMut::from(piece.as_slice());
            let started = std::time::Instant::now();
            let mut payload = 0;
            while let Some(length) = read(&mut buffer) {
                payload += length;
            }
            spent += started.elapsed();
            assert_eq!(payload, MESSAGES * 400);
        }
        println!("{name}: {:.1} ns a PUBLISH", spent.as_nanos() as f64 / (MESSAGES * ROUNDS) as f64);
    };
    for _ in 0..3 {
        measure("rumqttc", &theirs);
        measure("packet::parse", &ours);
    }
}
