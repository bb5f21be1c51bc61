//! The oracle of cost: what a message makes us write and hold, against its own size.
//!
//! Also a part of ingest's tests (`ingest/tests/cost.rs`), which hold structured hostile messages against it.

use std::borrow::Cow;

use bytes::Bytes;
use ingest::reading::{self, MAX_ERROR_BYTES, Reading, Rejection, Rules};
use ingest::session::{self, Session};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Letters of one message that a batch keeps; the rest become one.
const MAX_LETTERS: usize = 100;
/// What a letter takes besides payload, topic and error.
const LETTER_BYTES: usize = 128;
/// What a row or a session takes besides its texts.
const ROW_BYTES: usize = 100;

/// Bytes written for a message are at most so many times its size, besides the letters' own bytes.
pub const WRITTEN: usize = 3;
/// Bytes of memory that taking a message apart takes are at most so many times its size ..
pub const MEMORY_TIMES: usize = 4;
/// .. and so many.
pub const MEMORY_BYTES: usize = 32 << 10;
/// Of a compressed message: the tables and buffers of the decompressor.
pub const UNPACK_BYTES: usize = 2 << 20;

/// What a message came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    pub readings: usize,
    pub letters: usize,
    /// Bytes of rows, and of the refused parts.
    pub written: usize,
    /// Bytes of the letters besides the refused parts.
    pub overhead: usize,
    /// Most memory held at a time.
    pub memory: usize,
}

impl Cost {
    /// # Panics
    /// When a message of this size may not cost so much.
    pub fn check(&self, size: usize, unpacked: usize) {
        let shown = format!("{self:?}, {size} bytes, {unpacked} unpacked");
        assert!(unpacked <= 32 * size + (4 << 10), "{shown}");
        assert!(self.written <= WRITTEN * unpacked + ROW_BYTES, "{shown}");
        let letter = MAX_ERROR_BYTES + wire::topic::MAX_BYTES + LETTER_BYTES;
        assert!(self.overhead <= MAX_LETTERS * letter + letter, "{shown}");
        let unpacking = if unpacked == size { 0 } else { UNPACK_BYTES };
        // Memory grows by doubling.
        assert!(self.memory <= MEMORY_TIMES * unpacked.max(size) + MEMORY_BYTES + unpacking, "{shown}");
    }
}

/// Takes a telemetry message apart as a batch does, and measures.
#[must_use]
pub fn of_telemetry(topic: &[u8], message: &Bytes, rules: &Rules) -> (Cost, usize) {
    measured(message, rules, |payload, sink| {
        sink.topic = topic.len().min(wire::topic::MAX_BYTES);
        reading::visit(topic, payload, rules, sink);
    })
}

/// The same for user activity.
#[must_use]
pub fn of_session(message: &Bytes, rules: &Rules) -> (Cost, usize) {
    measured(message, rules, |payload, sink| session::visit(payload, rules, sink))
}

fn measured(message: &Bytes, rules: &Rules, visit: impl FnOnce(&[u8], &mut Sink)) -> (Cost, usize) {
    let mut payload = message.clone();
    let mut sink = Sink::default();
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    match reading::unpack(&mut payload, rules) {
        Ok(_) => visit(&payload, &mut sink),
        Err(rejection) => sink.letter(message, &rejection),
    }
    let mut cost = sink.cost;
    cost.memory = MEMORY.peak_usage().saturating_sub(before);
    // A message that was refused while it was unpacked has taken what unpacking takes.
    let packed = message.starts_with(&[0x1f, 0x8b]) || message.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    let unpacked = if packed { payload.len().max(32 * message.len() + 1) } else { payload.len() };
    (cost, unpacked)
}

#[derive(Debug, Default)]
struct Sink {
    topic: usize,
    cost: Cost,
}

impl Sink {
    fn letter(&mut self, part: &[u8], rejection: &Rejection) {
        assert!(!rejection.error.is_empty() && rejection.error.len() <= MAX_ERROR_BYTES);
        self.cost.letters += 1;
        self.cost.written += part.len();
        if self.cost.letters <= MAX_LETTERS {
            self.cost.overhead += self.topic + rejection.error.len() + LETTER_BYTES;
        }
    }
}

impl<'a> reading::Visitor<'a> for Sink {
    fn reading(&mut self, reading: &Reading<'_>) {
        let texts = [&reading.device_id, &reading.device_type, &reading.site_id];
        let documents = [Some(reading.metrics), reading.status, reading.location, reading.tags];
        self.cost.readings += 1;
        self.cost.written += texts.iter().map(|text| text.len()).sum::<usize>()
            + reading.firmware.as_ref().map_or(0, |text| text.len())
            + documents.iter().flatten().map(|document| document.len()).sum::<usize>()
            + ROW_BYTES;
    }
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        self.letter(part, &rejection);
    }
    fn restart(&mut self) {
        self.cost = Cost::default();
    }
}

impl<'a> session::Visitor<'a> for Sink {
    fn session(&mut self, session_id: Cow<'_, str>, session: Session) {
        let details = [&session.username, &session.region, &session.ip_address];
        self.cost.readings += 1;
        self.cost.written += session_id.len()
            + session.newest.user_id.len()
            + details.into_iter().flatten().map(|(_, text)| text.len()).sum::<usize>()
            + ROW_BYTES;
    }
    fn site(&mut self, site_id: Cow<'_, str>, _: i64, metrics: &str) {
        self.cost.readings += 1;
        self.cost.written += site_id.len() + metrics.len() + ROW_BYTES;
    }
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        self.letter(part, &rejection);
    }
}
