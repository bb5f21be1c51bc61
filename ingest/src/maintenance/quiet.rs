//! For how long nothing has been written to a partition, by the monotonic clock, which nobody can set.
//!
//! What was written before that is at least as old, whatever any other clock or device says. Counted while this process is
//! the elected one, and from the beginning when it is elected, when the server has crashed, after a failover.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use crate::failure::WriteError;
use crate::partitions::{Listing, Partition};

#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Rows ever written to it, by the server's statistics.
    written: i64,
    since: Instant,
}

/// What was seen of each partition.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    seen: HashMap<String, Seen>,
}

impl Quiet {
    /// Looks at all of a table's partitions.
    ///
    /// # Errors
    /// As classified by [`WriteError`].
    pub(super) async fn look(&mut self, client: &Client, listing: &Listing) -> Result<(), WriteError> {
        // An update writes a new row.
        const SQL: &str = "SELECT coalesce(pg_stat_get_tuples_inserted(to_regclass(name)) \
                + pg_stat_get_tuples_updated(to_regclass(name)), 0) \
            FROM unnest($1::text[]) WITH ORDINALITY AS partition (name, place) ORDER BY place";
        let names: Vec<String> = listing.partitions.iter().map(Partition::quoted).collect();
        let rows = client.query(SQL, &[&names]).await?;
        self.note(names.into_iter().zip(rows.iter().map(|row| row.get(0))), Instant::now());
        Ok(())
    }

    fn note(&mut self, found: impl Iterator<Item = (String, i64)>, now: Instant) {
        let mut before = std::mem::take(&mut self.seen);
        self.seen = found
            .map(|(name, written)| {
                let same = before.remove(&name).filter(|seen| seen.written == written);
                (name, same.unwrap_or(Seen { written, since: now }))
            })
            .collect();
    }

    /// Zero for one that was not seen.
    pub(super) fn duration(&self, partition: &Partition) -> Duration {
        self.seen.get(&partition.quoted()).map_or(Duration::ZERO, |seen| seen.since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn whatever_is_written_ends_the_quiet() {
        let partition = |name: &str| Partition {
            schema: "public".into(),
            name: name.into(),
            span: (0, 1),
            indexed: false,
            marked: false,
        };
        let (a, b) = (partition("a"), partition("b"));
        let mut quiet = Quiet::default();
        let mut note = async |a_written, b_written, seconds| {
            let found = [(a.quoted(), a_written), (b.quoted(), b_written)];
            quiet.note(found.into_iter(), Instant::now());
            tokio::time::advance(Duration::from_secs(seconds)).await;
            (quiet.duration(&a).as_secs(), quiet.duration(&b).as_secs())
        };
        assert_eq!(note(5, 7, 10).await, (10, 10));
        assert_eq!(note(5, 8, 10).await, (20, 10));
        // The server's statistics began anew.
        assert_eq!(note(0, 8, 10).await, (10, 20));
        assert_eq!(quiet.duration(&partition("c")), Duration::ZERO);
    }
}
