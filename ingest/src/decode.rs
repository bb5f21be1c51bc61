//! What the decoders of telemetry and of user activity share: rules, rejections, and fields of a JSON object.
//!
//! Everything an error text repeats of a message is cut, and so is the text: a message cannot make what is written about it
//! larger than it is itself.

pub(crate) mod elements;
mod escapes;
mod jsonb;
mod non_finite;
mod numbers;
pub(crate) mod time;
mod unpack;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use jiff::tz::TimeZone;
use serde_json::value::RawValue;

use crate::dead_letter::Reason;
use crate::error_text::cut;
use crate::settings::{IngestSettings, LenientSettings, SameIdentity, TimestampSettings};
use crate::tolerated::{Tolerances, Tolerated};
pub(crate) use jsonb::Hints;
pub(crate) use non_finite::as_null;
pub use unpack::unpack;

/// Longest accepted `device_id`, `device_type`, `site_id` and `firmware`, in bytes. Index rows end at 2,704 bytes; with
/// a larger limit Postgres would refuse what was accepted here.
pub const MAX_TEXT_BYTES: usize = 256;

/// Bytes of a value that an error text shows.
const MAX_SHOWN_BYTES: usize = 80;

/// Why something is not a reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    pub reason: Reason,
    /// At most [`crate::error_text::MAX_ERROR_BYTES`].
    pub error: String,
}

impl Rejection {
    pub(crate) fn new(reason: Reason, error: impl Into<String>) -> Self {
        Self { reason, error: cut(error.into()) }
    }

    /// The same with the place it concerns in front, for instance `element 17`.
    pub(crate) fn at(self, place: impl fmt::Display) -> Self {
        Self::new(self.reason, format!("{place}: {}", self.error))
    }
}

/// What a message must agree with.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Timestamps outside this range (microseconds since 1970) are refused.
    pub oldest_us: i64,
    pub newest_us: i64,
    /// Larger messages are refused unread.
    pub max_payload_bytes: usize,
    /// What becomes of another reading with the same device and timestamp.
    pub same_identity: SameIdentity,
    /// What is taken beyond the contract.
    pub tolerance: Arc<Tolerance>,
}

impl Rules {
    /// With what is tolerated by default.
    #[must_use]
    pub fn new(oldest_us: i64, newest_us: i64, max_payload_bytes: usize) -> Self {
        let same_identity = SameIdentity::default();
        Self { oldest_us, newest_us, max_payload_bytes, same_identity, tolerance: Arc::default() }
    }
}

/// Sections `[ingest.timestamps]` and `[ingest.lenient]`, ready for use.
#[derive(Debug)]
pub struct Tolerance {
    pub timestamps: TimestampSettings,
    pub lenient: LenientSettings,
    /// Time zones of sites.
    pub(crate) zones: HashMap<String, TimeZone>,
}

impl Tolerance {
    /// Settings that `check` has refused count as if no site had a zone.
    #[must_use]
    pub fn new(settings: &IngestSettings) -> Self {
        let (timestamps, lenient) = (settings.timestamps.clone(), settings.lenient.clone());
        Self { zones: timestamps.site_zones().unwrap_or_default(), timestamps, lenient }
    }

    /// Nothing but the contract.
    #[must_use]
    pub fn strict() -> Self {
        Self {
            timestamps: TimestampSettings { epoch: false, iso_8601: false, ..TimestampSettings::default() },
            lenient: LenientSettings {
                padding: false,
                drop_fields: false,
                numeric_ids: false,
                non_finite_as_null: false,
                compressed: false,
                empty: false,
            },
            zones: HashMap::new(),
        }
    }
}

impl Default for Tolerance {
    fn default() -> Self {
        Self::new(&IngestSettings::default())
    }
}

pub(crate) fn required<'a>(key: &str, raw: Option<&'a str>) -> Result<&'a str, Rejection> {
    raw.ok_or_else(|| Rejection::new(Reason::MissingField, format!("{key} is missing")))
}

/// A JSON string as text: borrowed unless it holds escapes.
pub(crate) fn text<'a>(key: &str, raw: &'a str) -> Result<Cow<'a, str>, Rejection> {
    let Some(inner) = raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
        return Err(wrong_type(key, raw, "a string"));
    };
    bounded(key, inner)?;
    if inner.is_empty() {
        return Err(Rejection::new(Reason::WrongType, format!("{key} is empty")));
    }
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Ok(Cow::Borrowed(inner));
    }
    let owned: String = serde_json::from_str(raw)
        .map_err(|error| Rejection::new(Reason::RejectedByDatabase, format!("{key}: {error}")))?;
    if owned.contains('\0') {
        return Err(Rejection::new(Reason::RejectedByDatabase, format!("{key} holds a NUL character")));
    }
    Ok(Cow::Owned(owned))
}

/// Refuses texts that are too long, before anything repeats them.
fn bounded(key: &str, text: &str) -> Result<(), Rejection> {
    if text.len() > MAX_TEXT_BYTES {
        let error = format!("{key} has {} bytes, the limit is {MAX_TEXT_BYTES}", text.len());
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    Ok(())
}

/// The text of a JSON number, if it is one.
pub(crate) fn number_text<'a>(key: &str, raw: &'a str) -> Result<Option<&'a str>, Rejection> {
    if !raw.starts_with(|first: char| first == '-' || first.is_ascii_digit()) {
        return Ok(None);
    }
    bounded(key, raw)?;
    Ok(Some(raw))
}

/// A JSON object as the text it arrived as, if jsonb can hold it. `hints` are those of the text around it.
pub(crate) fn object<'a>(key: &str, raw: &'a str, hints: Hints) -> Result<&'a str, Rejection> {
    if !raw.starts_with('{') {
        return Err(wrong_type(key, raw, "an object"));
    }
    match jsonb::refused(raw, hints) {
        None => Ok(raw),
        Some(error) => Err(Rejection::new(Reason::RejectedByDatabase, format!("{key}: {error}"))),
    }
}

/// An optional field; by setting left out when its type is wrong.
pub(crate) fn optional<T>(
    field: Option<Result<T, Rejection>>,
    rules: &Rules,
    tolerated: &mut Tolerances,
) -> Result<Option<T>, Rejection> {
    match field {
        Some(Err(rejection))
            if rejection.reason == Reason::WrongType && rules.tolerance.lenient.drop_fields =>
        {
            tolerated.add(Tolerated::FieldDropped);
            Ok(None)
        }
        other => other.transpose(),
    }
}

pub(crate) fn not_json(error: impl fmt::Display) -> Rejection {
    Rejection::new(Reason::NotJson, error.to_string())
}

/// Text, or the place of the first byte that is not UTF-8.
pub(crate) fn utf8(bytes: &[u8]) -> Result<&str, Rejection> {
    std::str::from_utf8(bytes).map_err(|error| {
        let byte = bytes.get(error.valid_up_to()).copied().unwrap_or_default();
        not_json(format!("not UTF-8: byte 0x{byte:02x} at offset {}", error.valid_up_to()))
    })
}

/// `key` is a JSON value of another type than it should be.
pub(crate) fn wrong_type(key: &str, raw: &str, expected: &str) -> Rejection {
    Rejection::new(Reason::WrongType, format!("{key} is {}, not {expected}", described(raw)))
}

/// The type of a JSON value, and the value when it is short to say.
pub(crate) fn described(raw: &str) -> String {
    match raw.bytes().next() {
        Some(b'"') => format!("the string {}", shown(raw)),
        Some(b'{') => "an object".into(),
        Some(b'[') => "an array".into(),
        Some(b'n') => "null".into(),
        Some(b't' | b'f') => format!("the boolean {}", shown(raw)),
        _ => format!("the number {}", shown(raw)),
    }
}

/// A value as an error text shows it: cut.
pub(crate) fn shown(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_SHOWN_BYTES {
        return Cow::Borrowed(text);
    }
    let start = text.get(..text.floor_char_boundary(MAX_SHOWN_BYTES)).unwrap_or_default();
    Cow::Owned(format!("{start}… ({} bytes)", text.len()))
}

/// Whether this is one JSON document.
pub(crate) fn check_json(text: &str) -> Result<(), Rejection> {
    serde_json::from_str::<&RawValue>(text).map(|_| ()).map_err(not_json)
}

/// Without JSON's white space at both ends.
pub(crate) fn trimmed(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\n' | b'\r' | b'\t', rest @ ..] = bytes {
        bytes = rest;
    }
    while let [rest @ .., b' ' | b'\n' | b'\r' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error_text::MAX_ERROR_BYTES;

    #[test]
    fn an_error_text_has_a_longest_length_and_ends_at_a_character() {
        for length in 490..510 {
            for filling in ["x", "é", "日", "\u{1f600}"] {
                let text = filling.repeat(length);
                let rejection = Rejection::new(Reason::WrongType, text.clone());
                assert!(rejection.error.len() <= MAX_ERROR_BYTES);
                assert!(rejection.at("element 4294967295").error.len() <= MAX_ERROR_BYTES);
                assert!(shown(&text).len() <= MAX_SHOWN_BYTES + 30);
            }
        }
        assert_eq!(Rejection::new(Reason::WrongType, "short").error, "short");
    }

    #[test]
    fn values_are_described_by_type_and_cut() {
        for (raw, expected) in [
            ("17", "the number 17"),
            ("-1", "the number -1"),
            ("\"a\"", "the string \"a\""),
            ("true", "the boolean true"),
            ("null", "null"),
            ("[1]", "an array"),
            ("{}", "an object"),
        ] {
            assert_eq!(described(raw), expected);
        }
        assert!(described(&format!("\"{}\"", "x".repeat(9_000))).len() < 130);
    }
}
