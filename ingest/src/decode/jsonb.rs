//! Why Postgres would refuse a (valid) JSON object as jsonb, or could not give it back: found here, so that it does not cost
//! a whole batch a try.

use std::borrow::Cow;

use super::numbers::MAX_DEPTH;
use super::{escapes, numbers};

/// What a text may hold of which jsonb refuses some. On the way of every message, so it is found in one look at the whole of
/// it, sixteen bytes at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hints(u8);

/// A digit followed by `e`.
const EXPONENT: u8 = 1;
const BACKSLASH: u8 = 2;
/// Sixteen digits or points in a row, which more than forty contain wherever they begin.
const DIGITS: u8 = 4;

const LANES: usize = 16;

impl Hints {
    /// Nothing is known: each document is looked at by itself.
    pub(crate) const ANY: Self = Self(EXPONENT | BACKSLASH | DIGITS);

    pub(crate) fn of(text: &[u8]) -> Self {
        let next = text.get(1..).unwrap_or_default();
        let (chunks, _) = text.as_chunks::<LANES>();
        let (next_chunks, _) = next.as_chunks::<LANES>();
        let mut seen = [0; LANES];
        let mut digits = false;
        for (chunk, next) in chunks.iter().zip(next_chunks) {
            digits |= look(chunk, next, &mut seen);
        }
        // The end, some of it for the second time.
        match (text.split_last_chunk::<LANES>(), next.split_last_chunk::<LANES>()) {
            (Some((before, last)), Some((_, next))) => {
                if let Some((_, last_but_one)) =
                    text.get(..text.len() - 1).and_then(|text| text.split_last_chunk())
                {
                    look(last_but_one, next, &mut seen);
                }
                digits |= !before.is_empty() && look(last, &[0; LANES], &mut seen);
            }
            _ => {
                for (byte, next) in text.iter().zip(next.iter().chain(&[0])) {
                    look(&[*byte; LANES], &[*next; LANES], &mut seen);
                }
            }
        }
        Self(seen.iter().fold(u8::from(digits) * DIGITS, |seen, lane| seen | lane))
    }

    /// Of a document within the text.
    fn within(self, document: &[u8]) -> Self {
        if self.0 == 0 { self } else { Self::of(document) }
    }

    fn has(self, hint: u8) -> bool {
        self.0 & hint != 0
    }

    /// Whether there may be an escape.
    pub(crate) fn backslash(self) -> bool {
        self.has(BACKSLASH)
    }
}

/// One step, without a branch: the compiler makes vector instructions of it. Whether all are digits or points.
fn look(chunk: &[u8; LANES], next: &[u8; LANES], seen: &mut [u8; LANES]) -> bool {
    let mut all = u8::MAX;
    for ((byte, next), seen) in chunk.iter().zip(next).zip(seen) {
        let exponent = (byte.wrapping_sub(b'0') < 10) & (next | 0x20 == b'e');
        *seen |= u8::from(exponent) | u8::from(*byte == b'\\') << 1;
        all &= u8::from(byte.wrapping_sub(b'.') < 12);
    }
    all != 0
}

/// Why, in words. `hints` are those of the text around it.
pub(super) fn refused(json: &str, hints: Hints) -> Option<Cow<'static, str>> {
    let bytes = json.as_bytes();
    let hints = hints.within(bytes);
    if hints.backslash()
        && let Some(error) = escapes::refused(bytes)
    {
        return Some(error.into());
    }
    // Brackets come in pairs, so only a long text is deep.
    if hints.has(EXPONENT | DIGITS) || bytes.len() > 2 * MAX_DEPTH {
        return numbers::refused(json).map(Into::into);
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_cannot_be_stored_or_read_back_is_refused() {
        let digits = |count: usize| "7".repeat(count);
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1));
        for (json, expected) in [
            ("{\"v\":1e308}".to_owned(), false),
            ("{\"v\":-1.7976931348623157E+308}".to_owned(), false),
            ("{\"v\":5e-324}".to_owned(), false),
            ("{\"v\":1e309}".to_owned(), true),
            ("{\"v\":[0,{\"w\":-1E7600}]}".to_owned(), true),
            ("{\"v\":1e-7600}".to_owned(), true),
            ("{\"v\":0e999999}".to_owned(), true),
            ("{\"v\":0.000e-99999999999999999999999}".to_owned(), true),
            ("{\"v\":10000e306}".to_owned(), true),
            (format!("{{\"v\":{}}}", digits(40)), false),
            (format!("{{\"v\":{}}}", digits(41)), true),
            (format!("{{\"v\":{}.{}}}", digits(20), digits(20)), false),
            (format!("{{\"v\":-{}.{}}}", digits(20), digits(21)), true),
            (format!("{{\"v\":0.{}1}}", "0".repeat(200)), false),
            // Texts, not numbers.
            ("{\"v\":\"1e7600\",\"1e999\":0}".to_owned(), false),
            (format!("{{\"v\":\"{}\"}}", digits(100)), false),
            ("{\"v\":\"\\\"1e7600\"}".to_owned(), false),
            ("{\"v\":\"\\\\\",\"w\":1e7600}".to_owned(), true),
            (nested(MAX_DEPTH), false),
            (nested(MAX_DEPTH + 1), true),
            (format!("{{\"v\":\"{}\"}}", "[".repeat(3_000)), false),
            (format!("{{\"v\":[{}[]]}}", "[],".repeat(3_000)), false),
        ] {
            for hints in [Hints::ANY, Hints::of(json.as_bytes())] {
                let refused = refused(&json, hints);
                assert_eq!(refused.is_some(), expected, "{json}: {refused:?}");
            }
        }
    }

    proptest! {
        /// The hints miss nothing that the slow scan finds.
        #[test]
        fn no_hint_means_nothing_to_find(
            before in "[a-z0-9.,:\"]{0,40}",
            number in "-?[0-9]{1,50}(\\.[0-9]{1,50})?([eE][+-]?[0-9]{1,4})?",
        ) {
            let json = format!("{{{}:{number}}}", serde_json::Value::from(before));
            let refused = refused(&json, Hints::of(json.as_bytes()));
            prop_assert_eq!(refused.is_some(), numbers::refused(&json).is_some(), "{}", json);
        }

        /// Wherever in the text it stands.
        #[test]
        fn no_place_hides_anything(at in 0..80_usize, length in 0..80_usize, escape in any::<bool>()) {
            let hidden = if escape { "\\" } else { "1E" };
            let text = format!("{}{hidden}{}", "x".repeat(at), "x".repeat(length));
            let hints = Hints::of(text.as_bytes());
            prop_assert_eq!((hints.backslash(), hints.has(EXPONENT)), (escape, !escape));
            let digits = format!("{}{}{}", "x".repeat(at), "7".repeat(41), "x".repeat(length));
            prop_assert!(Hints::of(digits.as_bytes()).has(DIGITS));
            prop_assert_eq!(Hints::of("xe1.".repeat(at).as_bytes()), Hints(0));
        }
    }
}
