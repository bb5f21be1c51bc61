//! The bounds of `dead_letters`: what it takes on disk, and what is stored of a letter when that is much.
//!
//! Whole days go first, oldest first. The current day cannot go, so when it alone takes half of the bound, letters lose
//! their payloads (length, SHA-256 and error stay), and at three quarters they are only counted. Both end with the day. So
//! one bad day costs itself and at most what was half a bound before it.
//!
//! A day that should go may not be dropped, as long as somebody reads it. Then the table is larger than its bound, and what is
//! above it is bounded in the same way: no payloads from a quarter above, no letters from a half above.

use tokio_postgres::Client;

use crate::failure::WriteError;
use crate::partitions::{Listing, Partition};

/// What is stored of a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage {
    pub letters: bool,
    pub payloads: bool,
}

/// Bytes on disk, indexes included.
#[derive(Debug)]
pub(super) struct Sizes {
    /// Partitions whose day has passed, oldest first.
    pub(super) closed: Vec<(Partition, u64)>,
    /// All others.
    pub(super) open: u64,
    /// Letters, as the server's statistics know them.
    pub(super) rows: u64,
}

impl Sizes {
    pub(super) fn total(&self) -> u64 {
        self.open + self.closed.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// The oldest days, without which the table is within its bound.
    pub(super) fn excess(&self, max_bytes: u64) -> Vec<Partition> {
        let mut total = self.total();
        let mut excess = Vec::new();
        for (partition, bytes) in &self.closed {
            if total <= max_bytes {
                break;
            }
            total -= bytes;
            excess.push(partition.clone());
        }
        excess
    }
}

/// `stuck_bytes`: of the whole table, while a day that should go cannot be dropped; 0 otherwise, since it is gone in a moment.
pub(super) fn decide(open_bytes: u64, stuck_bytes: u64, max_bytes: u64) -> Storage {
    let quarter = max_bytes / 4;
    Storage {
        letters: open_bytes < quarter * 3 && stuck_bytes < quarter * 6,
        payloads: open_bytes < max_bytes / 2 && stuck_bytes < quarter * 5,
    }
}

pub(super) async fn measure(client: &Client, now_us: i64, listing: &Listing) -> Result<Sizes, WriteError> {
    // One that is dropped meanwhile has no size.
    const SQL: &str = "SELECT coalesce(pg_total_relation_size(to_regclass(name)), 0), \
            coalesce(pg_stat_get_live_tuples(to_regclass(name)), 0) \
        FROM unnest($1::text[]) WITH ORDINALITY AS partition (name, place) ORDER BY place";
    let names: Vec<String> =
        listing.partitions.iter().map(Partition::quoted).chain(listing.default.clone()).collect();
    let mut sizes = Sizes { closed: Vec::new(), open: 0, rows: 0 };
    for (place, row) in client.query(SQL, &[&names]).await?.iter().enumerate() {
        let bytes = u64::try_from(row.get::<_, i64>(0)).unwrap_or(0);
        sizes.rows += u64::try_from(row.get::<_, i64>(1)).unwrap_or(0);
        match listing.partitions.get(place) {
            Some(partition) if partition.span.1 <= now_us => sizes.closed.push((partition.clone(), bytes)),
            _ => sizes.open += bytes,
        }
    }
    Ok(sizes)
}

/// Returns whether it was another before.
pub(super) async fn apply(client: &Client, storage: Storage) -> Result<bool, WriteError> {
    const SQL: &str = "INSERT INTO public.dead_letter_storage AS s (letters, payloads) VALUES ($1, $2) \
        ON CONFLICT (only_row) DO UPDATE SET letters = excluded.letters, payloads = excluded.payloads \
        WHERE (s.letters, s.payloads) IS DISTINCT FROM (excluded.letters, excluded.payloads)";
    const BEFORE: &str = "SELECT FROM public.dead_letter_storage WHERE letters = $1 AND payloads = $2";
    // Looked at first: an upsert that changes nothing still takes a lock, which is written to disk.
    if client.query_opt(BEFORE, &[&storage.letters, &storage.payloads]).await?.is_some() {
        return Ok(false);
    }
    client.execute(SQL, &[&storage.letters, &storage.payloads]).await?;
    Ok(true)
}

pub(super) async fn count(client: &Client, partition: &Partition) -> Result<u64, WriteError> {
    let row = client.query_one(&format!("SELECT count(*) FROM {}", partition.quoted()), &[]).await?;
    Ok(u64::try_from(row.get::<_, i64>(0)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_that_takes_too_much_loses_payloads_first_then_letters() {
        for (open, letters, payloads) in
            [(0, true, true), (511, true, true), (512, true, false), (767, true, false), (768, false, false)]
        {
            assert_eq!(decide(open, 0, 1024), Storage { letters, payloads }, "{open}");
        }
    }

    #[test]
    fn days_that_cannot_be_dropped_are_bounded_too() {
        for (stuck, letters, payloads) in
            [(1279, true, true), (1280, true, false), (1535, true, false), (1536, false, false)]
        {
            assert_eq!(decide(100, stuck, 1024), Storage { letters, payloads }, "{stuck}");
        }
    }

    #[test]
    fn the_oldest_days_make_room_and_no_more_than_is_needed() {
        let day = |name: &str, bytes: u64| {
            let partition = Partition {
                schema: "public".into(),
                name: name.into(),
                span: (0, 1),
                indexed: false,
                marked: false,
            };
            (partition, bytes)
        };
        let sizes = Sizes { closed: vec![day("a", 50), day("b", 30), day("c", 20)], open: 40, rows: 0 };
        let names = |max| sizes.excess(max).into_iter().map(|day| day.name).collect::<Vec<_>>();
        assert_eq!(names(140), [""; 0]);
        assert_eq!(names(139), ["a"]);
        assert_eq!(names(89), ["a", "b"]);
        assert_eq!(names(10), ["a", "b", "c"]);
    }
}
