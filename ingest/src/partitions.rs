//! Time partitions: made ahead (those of the past when a late reading needs one), indexed when their time has passed,
//! dropped after the retention. For every table that has them: `device_telemetry` and `dead_letters`.
//!
//! Nothing here blocks writers for long: partitions are attached, never created in place, and indexes are built
//! concurrently. `device_telemetry` has no default partition, so a stray reading can never make one. Which partitions
//! have expired is decided elsewhere ([`maintenance`](crate::maintenance)); here they are only dropped.

mod catalog;
mod dropping;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::Client;

pub use catalog::{Listing, Partition, list, taken_names};
pub use dropping::{Drops, clear_marks, drop_expired, finish_drops};

use crate::failure::WriteError;
use crate::settings::IngestSettings;
use crate::transaction::{self, BEGIN};

/// Held while partitions are made or dropped; one consumer at a time. The bytes of "tier0par".
const PARTITION_LOCK: i64 = 0x7469_6572_3070_6172;

/// Longest wait for a lock, so that maintenance never queues in front of writers.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '2s'";

/// One day, the width of a partition of `dead_letters`: they are few, and their retention is counted in days.
const DAY_US: i64 = 24 * 3600 * 1_000_000;

/// A table with time partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    DeviceTelemetry,
    DeadLetters,
}

impl Table {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::DeviceTelemetry => "device_telemetry",
            Self::DeadLetters => "dead_letters",
        }
    }

    /// The name with its schema, ready for SQL.
    pub(crate) fn qualified(self) -> String {
        format!("public.{}", self.name())
    }

    /// The column that says which partition a row belongs to.
    fn key(self) -> &'static str {
        match self {
            Self::DeviceTelemetry => "timestamp_utc",
            Self::DeadLetters => "received_at",
        }
    }
}

/// The layout: all times in microseconds since 1970.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub table: Table,
    pub width_us: i64,
    pub retention_us: i64,
    pub tolerance_us: i64,
}

/// A partition's span, end excluded.
pub type Span = (i64, i64);

/// As microseconds; a quarter of the largest number when it is longer, so that sums stay in range.
pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX).min(i64::MAX / 4)
}

impl Layout {
    /// Of `device_telemetry`.
    #[must_use]
    pub fn new(settings: &IngestSettings) -> Self {
        Self {
            table: Table::DeviceTelemetry,
            width_us: micros(settings.partition_width),
            retention_us: micros(settings.retention),
            tolerance_us: micros(settings.future_tolerance),
        }
    }

    /// Of `dead_letters`.
    #[must_use]
    pub fn of_dead_letters(settings: &IngestSettings) -> Self {
        Self {
            table: Table::DeadLetters,
            width_us: DAY_US,
            retention_us: micros(settings.dead_letter_retention),
            tolerance_us: micros(settings.future_tolerance),
        }
    }

    /// Oldest and newest accepted time at `now`.
    #[must_use]
    pub fn window(&self, now_us: i64) -> Span {
        (now_us - self.retention_us, now_us + self.tolerance_us)
    }

    /// The grid cells these times are in, each once, in order.
    #[must_use]
    pub fn cells(&self, times_us: impl Iterator<Item = i64>) -> Vec<i64> {
        let cells: BTreeSet<i64> =
            times_us.map(|time| time.div_euclid(self.width_us) * self.width_us).collect();
        cells.into_iter().collect()
    }

    /// All grid cells of `from..=to`.
    #[must_use]
    pub fn cells_between(&self, from_us: i64, to_us: i64) -> Vec<i64> {
        let step = usize::try_from(self.width_us).unwrap_or(usize::MAX);
        let first = from_us.div_euclid(self.width_us) * self.width_us;
        (first..=to_us).step_by(step).collect()
    }

    /// Spans to make so that the cells are covered and nothing overlaps what exists.
    #[must_use]
    pub fn missing(&self, existing: &[Span], cells: &[i64]) -> Vec<Span> {
        let mut existing = existing.to_vec();
        existing.sort_unstable();
        let mut spans = Vec::new();
        for start in cells {
            let end = start + self.width_us;
            let mut at = *start;
            for (taken_from, taken_to) in &existing {
                if *taken_to <= at || *taken_from >= end {
                    continue;
                }
                if *taken_from > at {
                    spans.push((at, *taken_from));
                }
                at = (*taken_to).min(end);
            }
            if at < end {
                spans.push((at, end));
            }
        }
        spans
    }
}

/// Partitions made in one transaction: each locks four relations, and the server's table of locks is finite.
const MADE_AT_ONCE: usize = 64;

/// Makes what is missing so that the cells are covered. Returns how many were made.
///
/// # Errors
/// As classified by [`WriteError`]; what was made before stays, nothing is half made. After [`WriteError::Retry`] and
/// [`WriteError::Unknown`] the connection must be thrown away.
pub async fn ensure(client: &mut Client, layout: &Layout, cells: &[i64]) -> Result<usize, WriteError> {
    let mut made = 0;
    loop {
        client.batch_execute(BEGIN).await?;
        let (now, all) = match make(client, layout, cells).await {
            Ok(counts) => counts,
            Err(error) => {
                transaction::roll_back(client).await?;
                return Err(error);
            }
        };
        transaction::commit(client).await?;
        made += now;
        if all <= now {
            return Ok(made);
        }
    }
}

/// In the connection's transaction. Returns how many were made and how many were missing.
async fn make(client: &Client, layout: &Layout, cells: &[i64]) -> Result<(usize, usize), WriteError> {
    client.batch_execute(LOCK_TIMEOUT).await?;
    client.execute("SELECT pg_catalog.pg_advisory_xact_lock($1)", &[&PARTITION_LOCK]).await?;
    let listing = list(client, layout.table).await?;
    let existing: Vec<Span> = listing.partitions.iter().map(|partition| partition.span).collect();
    let missing = layout.missing(&existing, cells);
    if missing.is_empty() {
        return Ok((0, 0));
    }
    // A partition that somebody has detached to keep it still has its name.
    let taken = taken_names(client, layout.table).await?;
    for span in missing.iter().take(MADE_AT_ONCE) {
        let name = free_name(layout.table, span.0, &taken);
        client.batch_execute(&create_sql(layout.table, &name, *span, listing.default.as_deref())).await?;
    }
    Ok((missing.len().min(MADE_AT_ONCE), missing.len()))
}

/// Builds the index for look-ups by device on one partition, beside the writers.
///
/// # Errors
/// As classified by [`WriteError`]; what a failed attempt leaves behind is removed by the next one.
pub async fn index_device(client: &Client, partition: &Partition) -> Result<(), WriteError> {
    let (table, index) = (partition.quoted(), partition.index_name());
    let drop = format!("DROP INDEX CONCURRENTLY IF EXISTS {}", partition.quoted_beside(&index));
    client.batch_execute(&drop).await?;
    let index = catalog::quote(&index);
    let sql = format!("CREATE INDEX CONCURRENTLY {index} ON {table} (device_id, timestamp_utc)");
    Ok(client.batch_execute(&sql).await?)
}

fn create_sql(table: Table, name: &str, (start_us, end_us): Span, default: Option<&str>) -> String {
    let (parent, name, key) = (table.qualified(), format!("public.{name}"), table.key());
    let (from, to) = (time(start_us), time(end_us));
    // Made aside and attached: CREATE .. PARTITION OF would lock the parent against writers.
    let mut sql = format!("CREATE TABLE {name} (LIKE {parent} INCLUDING ALL EXCLUDING IDENTITY);");
    if table == Table::DeviceTelemetry {
        sql += &format!("ALTER TABLE {name} SET (autovacuum_vacuum_insert_threshold = -1);");
    }
    // Rows of this span that had no partition before are in the default one, and it may hold none when this is attached.
    if let Some(default) = default {
        sql += &format!(
            "LOCK TABLE {default} IN ACCESS EXCLUSIVE MODE;\
             WITH moved AS (DELETE FROM {default} WHERE {key} >= {from} AND {key} < {to} RETURNING *) \
             INSERT INTO {name} SELECT * FROM moved;"
        );
    }
    sql += &format!("ALTER TABLE {parent} ATTACH PARTITION {name} FOR VALUES FROM ({from}) TO ({to})");
    sql
}

/// As SQL.
pub(crate) fn time(us: i64) -> String {
    format!("to_timestamp({}.{:06}::double precision)", us.div_euclid(1_000_000), us.rem_euclid(1_000_000))
}

/// The name of a new partition: when that of its time is taken, the first of `.._b2`, `.._b3` and so on that is not.
fn free_name(table: Table, start_us: i64, taken: &BTreeSet<String>) -> String {
    let name = format!("{}_{}", table.name(), stamp(start_us));
    let others = (2_u32..).map(|number| format!("{name}_b{number}"));
    std::iter::once(name.clone()).chain(others).find(|name| !taken.contains(name)).unwrap_or(name)
}

/// The start as `YYYYMMDD_HHMMSS`, with microseconds when there are any.
fn stamp(us: i64) -> String {
    let time = jiff::Timestamp::from_microsecond(us).unwrap_or_default();
    let mut text = time.strftime("%Y%m%d_%H%M%S").to_string();
    let fraction = us.rem_euclid(1_000_000);
    if fraction > 0 {
        write!(text, "_{fraction:06}").unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUT: Layout =
        Layout { table: Table::DeviceTelemetry, width_us: 60, retention_us: 600, tolerance_us: 60 };

    #[test]
    fn names_are_readable_and_free() {
        assert_eq!(stamp(1_770_091_500_000_000), "20260203_040500");
        let mut taken = BTreeSet::new();
        for expected in [
            "dead_letters_20260203_040500",
            "dead_letters_20260203_040500_b2",
            "dead_letters_20260203_040500_b3",
        ] {
            let name = free_name(Table::DeadLetters, 1_770_091_500_000_000, &taken);
            assert_eq!(name, expected);
            taken.insert(name);
        }
    }

    proptest! {
        #[test]
        fn the_window_is_covered_and_nothing_overlaps(
            cuts in prop::collection::btree_set(0..1000_i64, 0..12),
            keep in prop::collection::vec(any::<bool>(), 12),
            from in 0..900_i64,
            length in 0..300_i64,
        ) {
            let cuts: Vec<i64> = cuts.into_iter().collect();
            let existing: Vec<Span> = cuts.windows(2).zip(&keep).filter(|(_, keep)| **keep).map(|(w, _)| (w[0], w[1])).collect();
            let made = LAYOUT.missing(&existing, &LAYOUT.cells_between(from, from + length));
            let mut all: Vec<Span> = existing.iter().chain(&made).copied().collect();
            all.sort_unstable();
            for pair in all.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].0, "{:?} overlaps {:?}", pair[0], pair[1]);
            }
            for time in from..=from + length {
                prop_assert!(all.iter().any(|(start, end)| (*start..*end).contains(&time)), "{time} is not covered");
            }
        }
    }
}
