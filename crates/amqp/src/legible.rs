//! Makes legible, for the AMQP client, what publishers wrote.
//!
//! The broker passes short texts (routing key, content type, names of headers) on without looking at them, and headers within
//! headers as deep as a frame holds. The client takes a text that is no UTF-8 for a broken connection, and follows headers by
//! recursion until its stack ends. Either way the message would never arrive: it would be delivered again with every
//! connection, and nothing behind it would either.
//!
//! So such bytes are replaced before the client sees them, in place. A table of headers that is large is cut to what the broker and
//! we have written there. Bodies are not touched.

use std::ops::Range;

/// Larger frames pass unseen. The client asks for no limit of its own; RabbitMQ's is 128 KiB unless its administrator sets
/// another.
const MAX_FRAME: usize = 1 << 20;
/// What the broker itself adds (`x-death`) takes four.
const MAX_DEPTH: usize = 16;
/// Of a larger table of headers only those are kept that the broker adds, or we. A parsed header takes up to fifty times its
/// bytes; and a message that was published with a frame's worth of headers no longer fits into a frame when the broker has
/// counted a delivery.
const MAX_TABLE: usize = 4 << 10;
const OURS: &[u8] = b"x-";
const FRAME_HEAD: usize = 7;
const FRAME_TAIL: usize = 1;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
const UNREADABLE: u8 = b'?';

/// Bytes on their way from the socket to the client.
#[derive(Debug, Default)]
pub(crate) struct Legible {
    bytes: Vec<u8>,
    /// Of `bytes`: handed on.
    given: usize,
    /// Of `bytes`: may be handed on.
    ready: usize,
    /// Of a frame that passes unseen: still to come.
    passing: usize,
    /// No frames come here.
    raw: bool,
}

impl Legible {
    /// Moves what may be handed on to `to`, as much as fits.
    pub(crate) fn give(&mut self, to: &mut [u8]) -> usize {
        let from = self.bytes.get(self.given..self.ready).unwrap_or_default();
        let bytes = from.len().min(to.len());
        if let (Some(to), Some(from)) = (to.get_mut(..bytes), from.get(..bytes)) {
            to.copy_from_slice(from);
        }
        self.given += bytes;
        bytes
    }

    /// Takes what was read.
    pub(crate) fn take(&mut self, read: &[u8]) {
        self.bytes.drain(..self.given);
        self.ready -= self.given;
        self.given = 0;
        self.bytes.extend_from_slice(read);
        self.look();
    }

    fn look(&mut self) {
        loop {
            let waiting = self.bytes.get_mut(self.ready..).unwrap_or_default();
            let passing = if self.raw { waiting.len() } else { self.passing.min(waiting.len()) };
            self.passing -= passing.min(self.passing);
            self.ready += passing;
            let waiting = waiting.get_mut(passing..).unwrap_or_default();
            let Some((&[kind, _, _, a, b, c, d], _)) = waiting.split_first_chunk::<FRAME_HEAD>() else {
                return;
            };
            let payload = u32::from_be_bytes([a, b, c, d]) as usize;
            let length = payload.saturating_add(FRAME_HEAD + FRAME_TAIL);
            match kind {
                METHOD | HEADER if length <= MAX_FRAME => {
                    let Some(frame) = waiting.get_mut(FRAME_HEAD..length - FRAME_TAIL) else { return };
                    // What does not look as it should is the client's to judge.
                    let table = match kind {
                        METHOD => method(&mut Cursor::new(frame)).and(None),
                        _ => properties(&mut Cursor::new(frame)),
                    };
                    let shorter = table.filter(|table| table.len() > MAX_TABLE);
                    self.ready += length - shorter.map_or(0, |table| self.shorten(length, table));
                }
                METHOD | HEADER | BODY | HEARTBEAT => self.passing = length,
                _ => self.raw = true,
            }
            if self.ready == self.bytes.len() && self.passing == 0 {
                return;
            }
        }
    }

    /// Takes headers out of the frame of this length that comes next; `table` is where they are in its payload. Returns by how
    /// much it became shorter.
    fn shorten(&mut self, length: usize, table: Range<usize>) -> usize {
        let start = self.ready + FRAME_HEAD + table.start;
        let Some(old) = self.bytes.get(start..start + table.len()) else { return 0 };
        let kept = kept(old);
        let less = old.len() - kept.len();
        let payload = u32::try_from(length - FRAME_HEAD - FRAME_TAIL - less).unwrap_or_default();
        let size = u32::try_from(kept.len()).unwrap_or_default();
        self.bytes.splice(start - 4..start + table.len(), size.to_be_bytes().into_iter().chain(kept));
        if let Some(place) = self.bytes.get_mut(self.ready + 3..self.ready + FRAME_HEAD) {
            place.copy_from_slice(&payload.to_be_bytes());
        }
        less
    }
}

/// The broker's headers and ours; none when they are many too.
fn kept(table: &[u8]) -> Vec<u8> {
    let mut copy = table.to_vec();
    let mut fields = Cursor::new(&mut copy);
    let mut kept = Vec::new();
    while let Some((name, whole)) = fields.field() {
        if table.get(name).is_some_and(|name| name.starts_with(OURS)) {
            kept.extend_from_slice(table.get(whole).unwrap_or_default());
        }
    }
    if kept.len() > MAX_TABLE { Vec::new() } else { kept }
}

/// A place in a frame. Every step is `None` where the frame ends too early.
struct Cursor<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    fn skip(&mut self, count: usize) -> Option<Range<usize>> {
        let range = self.at..self.at.checked_add(count).filter(|end| *end <= self.bytes.len())?;
        self.at = range.end;
        Some(range)
    }

    fn u8(&mut self) -> Option<u8> {
        let at = self.skip(1)?.start;
        self.bytes.get(at).copied()
    }

    fn u16(&mut self) -> Option<u16> {
        let range = self.skip(2)?;
        Some(u16::from_be_bytes(self.bytes.get(range)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        let range = self.skip(4)?;
        Some(u32::from_be_bytes(self.bytes.get(range)?.try_into().ok()?))
    }

    /// A named field: where its name is, and all of it.
    fn field(&mut self) -> Option<(Range<usize>, Range<usize>)> {
        let start = self.at;
        let length = self.u8()?.into();
        let name = self.skip(length)?;
        let (_, _) = self.value()?;
        Some((name, start..self.at))
    }

    /// A value: its kind, and where its bytes are.
    fn value(&mut self) -> Option<(u8, Range<usize>)> {
        let kind = self.u8()?;
        let length = match kind {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'U' | b'u' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'L' | b'l' | b'd' | b'T' => 8,
            b'S' | b'x' | b'A' | b'F' => self.u32()? as usize,
            _ => return None,
        };
        Some((kind, self.skip(length)?))
    }

    fn short_text(&mut self) -> Option<()> {
        let length = self.u8()?.into();
        let range = self.skip(length)?;
        let text = self.bytes.get_mut(range)?;
        while let Err(error) = std::str::from_utf8(text) {
            let wrong = error.valid_up_to();
            // All to the end when it ends in the middle of a character.
            let end = error.error_len().map_or(text.len(), |length| wrong + length);
            text.get_mut(wrong..end)?.fill(UNREADABLE);
        }
        Some(())
    }
}

/// Those that carry what a publisher wrote, or the broker's words about it.
fn method(frame: &mut Cursor<'_>) -> Option<()> {
    const CONNECTION_CLOSE: (u16, u16) = (10, 50);
    const CHANNEL_CLOSE: (u16, u16) = (20, 40);
    const RETURN: (u16, u16) = (60, 50);
    const DELIVER: (u16, u16) = (60, 60);
    const GET_OK: (u16, u16) = (60, 71);
    match (frame.u16()?, frame.u16()?) {
        CONNECTION_CLOSE | CHANNEL_CLOSE => {
            frame.u16()?;
            frame.short_text()
        }
        RETURN => {
            frame.u16()?;
            (0..3).try_for_each(|_| frame.short_text())
        }
        DELIVER => {
            frame.short_text()?;
            frame.skip(9)?;
            (0..2).try_for_each(|_| frame.short_text())
        }
        GET_OK => {
            frame.skip(9)?;
            (0..2).try_for_each(|_| frame.short_text())
        }
        _ => Some(()),
    }
}

/// Returns where the table of headers is, if there is one.
fn properties(frame: &mut Cursor<'_>) -> Option<Range<usize>> {
    const HEADERS: u16 = 13;
    const DELIVERY_MODE: u16 = 12;
    const PRIORITY: u16 = 11;
    const TIMESTAMP: u16 = 6;
    /// Class, weight and the body's size.
    const BEFORE: usize = 12;
    frame.skip(BEFORE)?;
    let flags = frame.u16()?;
    let mut headers = None;
    for property in (2..16).rev().filter(|bit| flags & (1 << bit) != 0) {
        match property {
            HEADERS => {
                let length = frame.u32()? as usize;
                let range = frame.skip(length)?;
                headers = Some(range.clone());
                let table = frame.bytes.get_mut(range)?;
                if fields(&mut Cursor::new(table), true, 1).is_none() {
                    blank(table);
                }
            }
            DELIVERY_MODE | PRIORITY => frame.skip(1).map(drop)?,
            TIMESTAMP => frame.skip(8).map(drop)?,
            // The headers are known whatever follows.
            _ if frame.short_text().is_none() => return headers,
            _ => {}
        }
    }
    headers
}

/// A table, whose fields have names, or an array. `None` when the client could not follow it.
fn fields(table: &mut Cursor<'_>, named: bool, depth: usize) -> Option<()> {
    const BYTES: u8 = b'x';
    while table.at < table.bytes.len() {
        if named {
            table.short_text()?;
        }
        let kind_at = table.at;
        let (kind, range) = table.value()?;
        if kind == b'A' || kind == b'F' {
            let inner = table.bytes.get_mut(range)?;
            if depth == MAX_DEPTH || fields(&mut Cursor::new(inner), kind == b'F', depth + 1).is_none() {
                *table.bytes.get_mut(kind_at)? = BYTES;
            }
        }
    }
    Some(())
}

/// One field without a name, of bytes, in place of a table that cannot be read.
fn blank(table: &mut [u8]) {
    let Some(rest) = table.len().checked_sub(6).and_then(|rest| u32::try_from(rest).ok()) else { return };
    if let Some((head, _)) = table.split_first_chunk_mut::<6>() {
        let [a, b, c, d] = rest.to_be_bytes();
        *head = [0, b'x', a, b, c, d];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, 1][..], &length, payload, &[206]].concat()
    }

    fn short(text: &[u8]) -> Vec<u8> {
        [&[u8::try_from(text.len()).unwrap()][..], text].concat()
    }

    fn long(kind: u8, bytes: &[u8]) -> Vec<u8> {
        [&[kind][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
    }

    fn deliver(routing_key: &[u8]) -> Vec<u8> {
        let parts = [&[0, 60, 0, 60][..], &short(b"tag"), &[0; 9], &short(b"exchange"), &short(routing_key)];
        frame(METHOD, &parts.concat())
    }

    /// Content type, headers, type.
    fn header(content_type: &[u8], table: &[u8], class: &[u8]) -> Vec<u8> {
        let flags: u16 = 1 << 15 | 1 << 13 | 1 << 5;
        let table = long(0, table);
        let parts = [&[0; 12][..], &flags.to_be_bytes(), &short(content_type), &table[1..], &short(class)];
        frame(HEADER, &parts.concat())
    }

    fn through(bytes: &[u8], at_once: usize) -> Vec<u8> {
        let mut legible = Legible::default();
        let mut out = Vec::new();
        for piece in bytes.chunks(at_once) {
            legible.take(piece);
            let mut to = [0; 100];
            loop {
                match legible.give(&mut to) {
                    0 => break,
                    bytes => out.extend_from_slice(&to[..bytes]),
                }
            }
        }
        out
    }

    fn nested(levels: usize) -> Vec<u8> {
        (0..levels).fold(Vec::new(), |inner, _| long(b'A', &inner))
    }

    #[test]
    fn what_can_be_read_passes_as_it_is_however_it_is_cut() {
        let table = [short("ключ".as_bytes()), long(b'S', b"\xff\xfe"), short(b"b"), nested(5)].concat();
        let stream = [
            deliver("ключ".as_bytes()),
            header(b"application/json", &table, b"t"),
            frame(BODY, &[0xff; 1000]),
            frame(HEARTBEAT, &[]),
            frame(BODY, &[]),
            frame(METHOD, &vec![7; MAX_FRAME + 1]),
            deliver(b""),
        ]
        .concat();
        for at_once in [1, 2, 7, 8, 100, 1001, stream.len()] {
            assert!(through(&stream, at_once) == stream, "{at_once} bytes at once");
        }
    }

    #[test]
    fn texts_that_are_no_utf_8_are_replaced_byte_by_byte() {
        let stream = [deliver(b"a\xffb\xc3"), header(b"\xff\xfe", &short(b"x\x80"), b"ok\xe2\x82")].concat();
        // The name of the only header has no value: what cannot be read at all is the client's to judge.
        let expected = [deliver(b"a?b?"), header(b"??", &short(b"x?"), b"ok??")].concat();
        assert_eq!(through(&stream, 13), expected);
        let named = |name: &[u8]| [short(name), b"t\x01".to_vec()].concat();
        let stream = header(b"", &named(b"\xf0\x9f\x98"), b"");
        assert_eq!(through(&stream, 13), header(b"", &named(b"???"), b""));
    }

    #[test]
    fn depth_is_cut_and_the_neighbours_stay() {
        for levels in [MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH, 500] {
            let deep = [short(b"deep"), nested(levels)].concat();
            let table = [deep, short(b"b"), b"t\x01".to_vec()].concat();
            let stream = header(b"", &table, b"");
            let got = through(&stream, 4096);
            assert_eq!(got.len(), stream.len());
            let changed: Vec<usize> = (0..got.len()).filter(|at| got[*at] != stream[*at]).collect();
            let expected = usize::from(levels >= MAX_DEPTH);
            assert_eq!(changed.len(), expected, "{levels}: {changed:?}");
            assert!(changed.iter().all(|at| got[*at] == b'x' && stream[*at] == b'A'));
        }
    }

    #[test]
    fn a_large_table_is_cut_to_what_the_broker_and_we_have_written() {
        let ours = [
            short(b"x-death"),
            long(b'A', b""),
            short(b"x-tier0-returned"),
            vec![b'l', 0, 0, 0, 0, 0, 0, 0, 2],
        ];
        let many: Vec<u8> = (0..2000).flat_map(|_| [short(b"a"), vec![b'V']].concat()).collect();
        let deep = [short(b"deep"), nested(25_000)].concat();
        for foreign in [many, deep] {
            let stream =
                [header(b"t", &[&foreign, &ours.concat()[..]].concat(), b"u"), deliver(b"k")].concat();
            let expected = [header(b"t", &ours.concat(), b"u"), deliver(b"k")].concat();
            for at_once in [1000, 4096, stream.len()] {
                assert_eq!(through(&stream, at_once), expected);
            }
        }
        // Whoever writes a thousand names of ours.
        let forged: Vec<u8> = (0..2000).flat_map(|_| [short(b"x-a"), vec![b'V']].concat()).collect();
        assert_eq!(through(&header(b"t", &forged, b"u"), 4096), header(b"t", b"", b"u"));
    }

    #[test]
    fn a_table_of_an_unknown_kind_is_emptied() {
        let table = [short(b"name"), b"?whatever".to_vec()].concat();
        let got = through(&header(b"t", &table, b"u"), 50);
        let expected = [short(b""), long(b'x', &table[6..])].concat();
        assert_eq!(got, header(b"t", &expected, b"u"));
    }

    #[test]
    fn nothing_of_a_frame_waits_longer_than_it_must() {
        let mut legible = Legible::default();
        let body = frame(BODY, &[1; 100]);
        legible.take(&body[..50]);
        assert_eq!(legible.give(&mut [0; 100]), 50);
        legible.take(b"AMQP");
        assert_eq!(legible.give(&mut [0; 100]), 4, "the rest of it");
        let mut legible = Legible::default();
        // A broker that wants another protocol says so.
        legible.take(b"AMQP\x00\x01\x00\x00");
        assert_eq!(legible.give(&mut [0; 100]), 8);
    }

    /// Any bytes, cut anywhere: never more, never fewer.
    #[test]
    fn whatever_comes_keeps_its_length() {
        let mut seed = 1_u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as u8
        };
        for round in 0..2000 {
            let table: Vec<u8> =
                (0..random()).map(|_| b"AFxStV\x00\x01\xff"[usize::from(random()) % 9]).collect();
            let stream = [header(&[random(); 3], &table, b""), deliver(&[random()])].concat();
            let got = through(&stream, 1 + round % 60);
            assert_eq!(got.len(), stream.len());
            assert_eq!(through(&got, 1000), got, "what is legible stays so");
        }
    }
}
