//! Identities seen lately: a hint which rows may be stored already.
//!
//! A plain COPY fails as a whole when one of its rows is stored. Rows that were seen before are therefore kept apart and
//! merged, so that a flood of duplicates leaves the others on the fast path. Only a hint: a wrong "seen" costs a merge of
//! one row, a wrong "new" the merge of one batch; neither ever costs a row.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Slots, a power of two; 8 bytes each. At 20,000 readings a second this remembers most of the last 100 seconds;
/// larger would leave the processor's caches even more often for ever rarer duplicates.
const SLOTS: usize = 1 << 21;

/// A table with one place for each fingerprint; the newer one takes it.
#[derive(Debug)]
pub struct Recent {
    slots: Vec<u64>,
}

impl Default for Recent {
    fn default() -> Self {
        Self { slots: vec![0; SLOTS] }
    }
}

impl Recent {
    /// Whether this identity was probably seen lately. Remembers it.
    pub fn seen(&mut self, device_id: &str, timestamp_us: i64) -> bool {
        let mut hasher = DefaultHasher::new();
        device_id.hash(&mut hasher);
        timestamp_us.hash(&mut hasher);
        // 0 marks an empty slot.
        let fingerprint = hasher.finish() | 1;
        let slot = usize::try_from(fingerprint >> 32).unwrap_or_default() & (SLOTS - 1);
        match self.slots.get_mut(slot) {
            Some(place) => std::mem::replace(place, fingerprint) == fingerprint,
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_lately_is_known_and_nothing_else() {
        let mut recent = Recent::default();
        let wrong = (0..100_000).filter(|n| recent.seen(&format!("D-{n}"), 17)).count();
        assert_eq!(wrong, 0);
        let known = (0..100_000).filter(|n| recent.seen(&format!("D-{n}"), 17)).count();
        assert!(known > 90_000, "{known}");
        assert!(!recent.seen("D-1", 18));
    }
}
