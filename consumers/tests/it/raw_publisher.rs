//! A publisher that sends what AMQP libraries would not: texts that are no UTF-8, headers nested thousands deep.

use std::io::{Read, Write};
use std::net::TcpStream;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const FRAME_END: u8 = 0xce;
const BASIC: u16 = 60;

/// The properties of one message; an empty one is not sent.
#[derive(Default)]
pub(crate) struct Properties<'a> {
    pub(crate) content_type: &'a [u8],
    /// The table's fields, encoded.
    pub(crate) headers: Vec<u8>,
    pub(crate) message_id: &'a [u8],
}

/// A connection with one channel that confirms.
pub(crate) struct RawPublisher {
    stream: TcpStream,
    confirmed: u64,
}

pub(crate) fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()][..], text].concat()
}

/// A value of this kind: bytes, a table, an array.
pub(crate) fn long(kind: u8, bytes: &[u8]) -> Vec<u8> {
    [&[kind][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// Arrays within arrays.
pub(crate) fn nested(levels: usize) -> Vec<u8> {
    (0..levels).fold(Vec::new(), |inner, _| long(b'A', &inner))
}

impl RawPublisher {
    pub(crate) fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(crate::floor::PATIENCE)).unwrap();
        let mut publisher = Self { stream, confirmed: 0 };
        publisher.stream.write_all(b"AMQP\x00\x00\x09\x01").unwrap();
        publisher.until(10, 10);
        let login =
            [&[0; 4][..], &short(b"PLAIN"), &long(0, b"\0guest\0guest")[1..], &short(b"en_US")].concat();
        publisher.method(0, 10, 11, &login);
        publisher.until(10, 30);
        // Channels, the broker's largest frame, no heartbeat.
        publisher.method(0, 10, 31, &[0, 1, 0, 2, 0, 0, 0, 0]);
        publisher.method(0, 10, 40, &[short(b"/"), vec![0, 0]].concat());
        publisher.until(10, 41);
        publisher.method(1, 20, 10, &[0]);
        publisher.until(20, 11);
        publisher.method(1, 85, 10, &[0]);
        publisher.until(85, 11);
        publisher
    }

    /// Publishes one message; returns when the broker has confirmed it.
    pub(crate) fn publish(
        &mut self,
        exchange: &str,
        key: &[u8],
        payload: &[u8],
        properties: &Properties<'_>,
    ) {
        let publish = [&[0, 0][..], &short(exchange.as_bytes()), &short(key), &[0]].concat();
        self.method(1, BASIC, 40, &publish);
        let mut flags = 0_u16;
        let mut values = Vec::new();
        if !properties.content_type.is_empty() {
            flags |= 1 << 15;
            values.extend(short(properties.content_type));
        }
        if !properties.headers.is_empty() {
            flags |= 1 << 13;
            values.extend(&long(0, &properties.headers)[1..]);
        }
        if !properties.message_id.is_empty() {
            flags |= 1 << 7;
            values.extend(short(properties.message_id));
        }
        let size = u64::try_from(payload.len()).unwrap().to_be_bytes();
        let header = [&BASIC.to_be_bytes()[..], &[0, 0], &size, &flags.to_be_bytes(), &values].concat();
        self.frame(HEADER, 1, &header);
        self.frame(BODY, 1, payload);
        let ack = self.until(BASIC, 80);
        self.confirmed += 1;
        assert_eq!(ack[4..12], self.confirmed.to_be_bytes(), "the broker confirms this message");
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        self.frame(METHOD, channel, &payload);
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let frame = [&[kind][..], &channel.to_be_bytes(), &length, payload, &[FRAME_END]].concat();
        self.stream.write_all(&frame).unwrap();
    }

    /// The payload of the next frame, which has to be this method.
    fn until(&mut self, class: u16, method: u16) -> Vec<u8> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[3..].try_into().unwrap());
        let mut payload = vec![0; usize::try_from(length).unwrap() + 1];
        self.stream.read_exact(&mut payload).unwrap();
        let said = (
            head[0],
            u16::from_be_bytes([payload[0], payload[1]]),
            u16::from_be_bytes([payload[2], payload[3]]),
        );
        assert_eq!(said, (METHOD, class, method), "{}", String::from_utf8_lossy(&payload));
        payload
    }
}
