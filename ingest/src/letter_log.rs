//! One line in the log for a kind of dead letter now and then, with a sample: a metric says how many, this says what.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use wire::topic::Topic;

use crate::dead_letter::{DeadLetter, Reason};

/// Between two lines of one reason and device type.
const PERIOD: Duration = Duration::from_secs(60);
/// Kinds remembered at once; strangers make device types up.
const MAX_KINDS: usize = 256;
/// Of a payload in the log.
const SAMPLE_BYTES: usize = 200;

/// Shared by all writers of a process. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct LetterLog {
    kinds: Arc<Mutex<HashMap<(Reason, String), Kind>>>,
}

#[derive(Debug)]
struct Kind {
    logged: Instant,
    /// Since then.
    more: u64,
}

impl LetterLog {
    /// Says what kinds of letters these are, unless it was said lately.
    pub fn note(&self, letters: &[DeadLetter]) {
        for letter in letters {
            let device_type = Topic::parse(&letter.topic).map_or("", |topic| topic.device_type);
            if let Some(more) = self.is_due(letter.reason, device_type) {
                let sample =
                    String::from_utf8_lossy(letter.payload.get(..SAMPLE_BYTES).unwrap_or(&letter.payload));
                tracing::warn!(
                    reason = letter.reason.as_str(),
                    device_type,
                    topic = %String::from_utf8_lossy(&letter.topic).escape_debug(),
                    error = %letter.error.escape_debug(),
                    payload = %sample.escape_debug(),
                    more_since_last_line = more,
                    "dead letter"
                );
            }
        }
    }

    /// How many of this kind had no line since the last one; `None` when it is too early for another.
    fn is_due(&self, reason: Reason, device_type: &str) -> Option<u64> {
        let now = Instant::now();
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (reason, device_type.to_owned());
        if let Some(kind) = kinds.get_mut(&key) {
            if now - kind.logged < PERIOD {
                kind.more += 1;
                return None;
            }
            kind.logged = now;
            return Some(std::mem::take(&mut kind.more));
        }
        if kinds.len() >= MAX_KINDS {
            kinds.retain(|_, kind| now - kind.logged < PERIOD);
        }
        if kinds.len() >= MAX_KINDS {
            return None;
        }
        kinds.insert(key, Kind { logged: now, more: 0 });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_kind_is_said_once_a_minute_and_kinds_are_bounded() {
        let log = LetterLog::default();
        assert_eq!(log.is_due(Reason::NotJson, "turbine"), Some(0));
        assert_eq!(log.is_due(Reason::NotJson, "turbine"), None);
        assert_eq!(log.is_due(Reason::WrongType, "turbine"), Some(0));
        tokio::time::advance(PERIOD).await;
        assert_eq!(log.is_due(Reason::NotJson, "turbine"), Some(1));
        let said = (0..10_000).filter(|n| log.is_due(Reason::NotJson, &n.to_string()).is_some()).count();
        assert!(said < MAX_KINDS);
        assert!(log.kinds.lock().unwrap().len() <= MAX_KINDS);
    }
}
