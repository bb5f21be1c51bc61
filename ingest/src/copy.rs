//! Postgres' binary COPY format, written straight into one buffer.
//!
//! A row is a field count and, for each field, its length and its bytes. Nothing here allocates but the buffer.

use bytes::{BufMut, Bytes, BytesMut};

use crate::timestamp::POSTGRES_EPOCH_US;

/// Signature, flags (none) and header extension length (none).
pub const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";

/// The field count that ends a COPY.
pub const TRAILER: &[u8] = &[0xff, 0xff];

/// The first byte of a jsonb value in binary format; the text of the document follows.
const JSONB_VERSION: u8 = 1;

/// How much goes into one CopyData message. The server holds a whole message before it reads the first row, so
/// larger ones stop it from working while the client still sends.
const MESSAGE_BYTES: usize = 128 << 10;

/// Starts a row of `fields` fields.
pub fn row(buffer: &mut BytesMut, fields: i16) {
    buffer.put_i16(fields);
}

/// A text field. The caller has made sure that there is no NUL in it.
pub fn text(buffer: &mut BytesMut, value: &str) {
    put(buffer, value.as_bytes());
}

/// A timestamptz field from microseconds since 1970.
pub fn timestamptz(buffer: &mut BytesMut, micros: i64) {
    buffer.put_i32(8);
    buffer.put_i64(micros - POSTGRES_EPOCH_US);
}

/// A jsonb field from the document's text as it arrived.
pub fn jsonb(buffer: &mut BytesMut, document: &str) {
    buffer.put_i32(i32::try_from(document.len() + 1).unwrap_or(i32::MAX));
    buffer.put_u8(JSONB_VERSION);
    buffer.put_slice(document.as_bytes());
}

/// SQL NULL.
pub fn null(buffer: &mut BytesMut) {
    buffer.put_i32(-1);
}

fn put(buffer: &mut BytesMut, value: &[u8]) {
    // Messages are limited to megabytes long before this could be reached.
    buffer.put_i32(i32::try_from(value.len()).unwrap_or(i32::MAX));
    buffer.put_slice(value);
}

/// Cuts rows into the pieces that are sent as one message each. Shares the memory.
pub fn messages(mut rows: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || (!rows.is_empty()).then(|| rows.split_to(rows.len().min(MESSAGE_BYTES))))
}
