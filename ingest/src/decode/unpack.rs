//! What is around a message: compression, a byte order mark, padding. Taken off before anything else looks at it.

use std::io::Read;

use bytes::Bytes;
use flate2::bufread::GzDecoder;
use ruzstd::decoding::StreamingDecoder;

use super::{Rejection, Rules, not_json};
use crate::dead_letter::Reason;
use crate::tolerated::{Tolerances, Tolerated};

/// What a compressed message may grow to: so many times its size ..
const MAX_RATIO: usize = 32;
/// .. and so much. A message of a few hundred bytes is mostly headers.
const RATIO_EXEMPT_BYTES: usize = 4 << 10;

/// Largest window of a zstd frame; RFC 8878 asks decoders for 8 MB. What is held grows with the output, which is bounded too.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const BYTE_ORDER_MARK: &[u8] = &[0xef, 0xbb, 0xbf];

/// Takes compression, byte order mark and NUL bytes off a message; says what there was. Costs a few comparisons for one that
/// has none of them.
///
/// # Errors
/// A compressed message that is broken or too large. It stays as it is.
pub fn unpack(payload: &mut Bytes, rules: &Rules) -> Result<Tolerances, Rejection> {
    let lenient = &rules.tolerance.lenient;
    let mut tolerated = Tolerances::NONE;
    // Too large ones are refused by the decoder, unread.
    if lenient.compressed && payload.len() <= rules.max_payload_bytes {
        let limit = rules.max_payload_bytes.min(payload.len() * MAX_RATIO + RATIO_EXEMPT_BYTES);
        let plain = if payload.starts_with(GZIP) {
            Some(gunzip(payload, limit)?)
        } else if payload.starts_with(ZSTD) {
            Some(unzstd(payload, limit)?)
        } else {
            None
        };
        if let Some(plain) = plain {
            *payload = plain.into();
            tolerated.add(Tolerated::Compressed);
        }
    }
    if lenient.padding {
        let bare = unpadded(payload);
        if bare.len() < payload.len() && !bare.is_empty() {
            *payload = payload.slice_ref(bare);
            tolerated.add(Tolerated::Padding);
        }
    }
    Ok(tolerated)
}

/// Without a byte order mark, and without NUL bytes and the white space among them.
fn unpadded(payload: &[u8]) -> &[u8] {
    let mut bare = payload.strip_prefix(BYTE_ORDER_MARK).unwrap_or(payload);
    let mut end = bare;
    while let [rest @ .., 0 | b' ' | b'\n' | b'\r' | b'\t'] = end {
        end = rest;
        if bare.get(end.len()) == Some(&0) {
            bare = end;
        }
    }
    bare
}

fn gunzip(payload: &[u8], limit: usize) -> Result<Vec<u8>, Rejection> {
    let mut decoder = GzDecoder::new(payload);
    let plain = bounded(&mut decoder, "gzip", limit)?;
    nothing_after(decoder.into_inner(), "gzip")?;
    Ok(plain)
}

fn unzstd(payload: &[u8], limit: usize) -> Result<Vec<u8>, Rejection> {
    let mut decoder = StreamingDecoder::new_with_max_window_size(payload, MAX_ZSTD_WINDOW)
        .map_err(|error| not_json(format!("zstd: {error}")))?;
    let plain = bounded(&mut decoder, "zstd", limit)?;
    nothing_after(decoder.into_inner(), "zstd")?;
    Ok(plain)
}

fn bounded(decoder: impl Read, format: &str, limit: usize) -> Result<Vec<u8>, Rejection> {
    let mut plain = Vec::new();
    let mut decoder = decoder.take(limit as u64 + 1);
    decoder.read_to_end(&mut plain).map_err(|error| not_json(format!("{format}: {error}")))?;
    if plain.len() > limit {
        let error = format!("{format}: decompressed to more than {limit} bytes, the limit for this message");
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    Ok(plain)
}

/// A second stream, or garbage, would be lost.
fn nothing_after(rest: &[u8], format: &str) -> Result<(), Rejection> {
    if rest.iter().all(|byte| matches!(byte, 0 | b'\n' | b'\r')) {
        return Ok(());
    }
    Err(not_json(format!("{format}: {} bytes after the compressed data", rest.len())))
}

#[cfg(test)]
mod tests;
