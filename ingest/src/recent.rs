//! Identities seen lately: a hint which rows may be stored already.
//!
//! A plain COPY fails as a whole when one of its rows is stored. Rows that were seen before are therefore kept apart and
//! merged, so that a flood of duplicates leaves the others on the fast path. Only a hint: a wrong "seen" costs a merge of
//! one row, a wrong "new" the merge of one batch; neither ever costs a row.
//!
//! Readings of about the same time are remembered close together: what arrives now touches half a megabyte, which the
//! processor's cache holds, and not all eight.

use std::hash::{DefaultHasher, Hash, Hasher};

/// Each for 4.2 s of the readings' own time, so that together they reach back for a minute of live traffic.
const REGIONS: usize = 16;
const REGION_SHIFT: u32 = 22;
/// Of one region: 131,072 identities, 84,000 of which 20,000 readings a second need.
const BUCKETS: usize = 1 << 13;
const PLACES: usize = 16;

/// One line of the processor's cache, newest first. 0 is an empty place.
#[derive(Debug, Clone)]
#[repr(align(64))]
struct Bucket([u32; PLACES]);

/// Fingerprints of identities; in each bucket the newest ones stay.
#[derive(Debug)]
pub struct Recent {
    buckets: Vec<Bucket>,
}

impl Default for Recent {
    fn default() -> Self {
        Self { buckets: vec![Bucket([0; PLACES]); REGIONS * BUCKETS] }
    }
}

impl Recent {
    /// Whether this identity was probably seen lately. Remembers it.
    pub fn seen(&mut self, device_id: &str, timestamp_us: i64) -> bool {
        let mut hasher = DefaultHasher::new();
        device_id.hash(&mut hasher);
        timestamp_us.hash(&mut hasher);
        let hash = hasher.finish();
        let fingerprint = u32::try_from(hash >> 32).unwrap_or_default() | 1;
        let region = low_bits(timestamp_us.cast_unsigned() >> REGION_SHIFT, REGIONS);
        let place = region * BUCKETS + low_bits(hash, BUCKETS);
        let Some(Bucket(places)) = self.buckets.get_mut(place) else { return false };
        // Without an early end: one comparison of the whole line.
        if places.iter().fold(false, |seen, place| seen | (*place == fingerprint)) {
            return true;
        }
        places.copy_within(..PLACES - 1, 1);
        let [newest, ..] = places;
        *newest = fingerprint;
        false
    }
}

/// `count` is a power of two.
fn low_bits(bits: u64, count: usize) -> usize {
    usize::try_from(bits & u64::from(u32::MAX)).unwrap_or_default() & (count - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_of_live_readings_is_known_and_nothing_else() {
        let mut recent = Recent::default();
        let mut pass = |late: i64| {
            (0..1_200_000).filter(|n| recent.seen(&format!("D-{}", n % 100_000), n * 50 - late)).count()
        };
        assert_eq!(pass(0), 0);
        let known = pass(0);
        assert!(known > 1_100_000, "{known}");
        assert_eq!(pass(1), 0);
    }

    #[test]
    fn one_time_for_all_and_times_before_1970_are_remembered_too() {
        let mut recent = Recent::default();
        for time in [i64::MIN, -1, 17, i64::MAX] {
            let mut pass = || (0..50_000).filter(|n| recent.seen(&format!("D-{n}"), time)).count();
            assert_eq!(pass(), 0);
            assert!(pass() > 49_900);
        }
    }
}
