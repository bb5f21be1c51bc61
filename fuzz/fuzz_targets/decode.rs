//! Any topic and payload through the decoder of telemetry. It must not panic, must not cost more than the message's own size
//! allows, and must find again what it took.

#![no_main]

use bytes::Bytes;
use fuzz::{TOPIC, cost, rules};
use ingest::reading::{self, Reading, Rejection};
use libfuzzer_sys::fuzz_target;

/// Checks that every reading is found again by its element.
struct Again<'a>(&'a [u8]);

impl<'a> reading::Visitor<'a> for Again<'a> {
    fn reading(&mut self, reading: &Reading<'_>) {
        let element = reading::element_at(self.0, reading.element);
        let metrics = reading.metrics.as_bytes();
        let found = element.windows(metrics.len()).any(|window| window == metrics);
        assert!(found || reading.tolerated.contains(ingest::tolerated::Tolerated::NonFinite));
    }
    fn rejected(&mut self, _: &'a [u8], _: Rejection) {}
    fn restart(&mut self) {}
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first() else { return };
    let rules = rules(*choice);
    let (topic, payload) = match rest.iter().position(|byte| *byte == b'\n') {
        Some(at) if choice & 0x80 != 0 => (&rest[..at], &rest[at + 1..]),
        _ => (TOPIC, rest),
    };
    let message = Bytes::copy_from_slice(payload);
    let (cost, unpacked) = cost::of_telemetry(topic, &message, &rules);
    cost.check(message.len(), unpacked);
    let mut plain = message;
    if reading::unpack(&mut plain, &rules).is_ok() {
        reading::visit(topic, &plain, &rules, &mut Again(&plain));
    }
});
