//! The MQTT topic of a reading: `og/field/{site_id}/{device_type}/{device_id}`.

use std::fmt;

/// What a consumer of all telemetry subscribes to.
pub const FILTER: &str = "og/field/#";

/// The two levels every telemetry topic starts with.
pub const PREFIX: &str = "og/field/";

/// Longest topic that is taken apart, in bytes. Each of its three levels is stored with every reading and is at most 256
/// bytes; a longer topic would only make dead letters large.
pub const MAX_BYTES: usize = 800;

/// A telemetry topic taken apart. Borrowed from the packet it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic<'a> {
    pub site_id: &'a str,
    pub device_type: &'a str,
    pub device_id: &'a str,
}

/// Why a topic is not one of ours. The text goes into the dead letter's `error` column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    #[error("topic has {0} bytes, the limit is {MAX_BYTES}")]
    TooLong(usize),
    #[error("topic is not UTF-8")]
    NotUtf8,
    #[error("topic does not start with og/field/")]
    Prefix,
    #[error("topic has not exactly five levels: og/field/site_id/device_type/device_id")]
    Levels,
    #[error("topic has an empty level")]
    Empty,
}

impl<'a> Topic<'a> {
    /// Takes a topic apart without copying.
    ///
    /// # Errors
    /// [`TopicError`] when the bytes are not `og/field/` and three non-empty levels, or are more than [`MAX_BYTES`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, TopicError> {
        if bytes.len() > MAX_BYTES {
            return Err(TopicError::TooLong(bytes.len()));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| TopicError::NotUtf8)?;
        let rest = text.strip_prefix(PREFIX).ok_or(TopicError::Prefix)?;
        let (site_id, rest) = rest.split_once('/').ok_or(TopicError::Levels)?;
        let (device_type, device_id) = rest.split_once('/').ok_or(TopicError::Levels)?;
        if device_id.contains('/') {
            return Err(TopicError::Levels);
        }
        if site_id.is_empty() || device_type.is_empty() || device_id.is_empty() {
            return Err(TopicError::Empty);
        }
        Ok(Self { site_id, device_type, device_id })
    }
}

impl fmt::Display for Topic<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}/{}/{}", self.site_id, self.device_type, self.device_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics_and_what_it_takes_it_gives_back(bytes in prop::collection::vec(any::<u8>(), 0..60), ours in any::<bool>()) {
            let bytes = if ours { [PREFIX.as_bytes(), bytes.as_slice()].concat() } else { bytes };
            if let Ok(topic) = Topic::parse(&bytes) {
                prop_assert_eq!(topic.to_string().into_bytes(), bytes);
            }
        }
    }

    #[test]
    fn takes_apart_what_it_puts_together() {
        let topic = Topic { site_id: "TX-EAGLE", device_type: "turbine", device_id: "TURB-00417" };
        assert_eq!(topic.to_string(), "og/field/TX-EAGLE/turbine/TURB-00417");
        assert_eq!(Topic::parse(topic.to_string().as_bytes()), Ok(topic));
    }

    #[test]
    fn refuses_what_is_not_a_telemetry_topic() {
        for (bytes, error) in [
            (&b"og/field/TX/turbine"[..], TopicError::Levels),
            (b"og/field/TX/turbine/a/b", TopicError::Levels),
            (b"og/field/TX//a", TopicError::Empty),
            (b"og/field/TX/turbine/", TopicError::Empty),
            (b"og/site/TX/turbine/a", TopicError::Prefix),
            (b"", TopicError::Prefix),
            (b"og/field/\xff/turbine/a", TopicError::NotUtf8),
        ] {
            assert_eq!(Topic::parse(bytes), Err(error), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_topic_has_a_longest_length() {
        let longest =
            format!("{PREFIX}TX/turbine/{}", "d".repeat(MAX_BYTES - PREFIX.len() - "TX/turbine/".len()));
        assert!(Topic::parse(longest.as_bytes()).is_ok());
        let longer = format!("{longest}d");
        assert_eq!(Topic::parse(longer.as_bytes()), Err(TopicError::TooLong(MAX_BYTES + 1)));
    }
}
