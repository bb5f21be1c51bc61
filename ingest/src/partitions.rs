//! Time partitions of `device_telemetry`: made ahead (those of the past when a late reading needs one), indexed when
//! their time has passed, dropped after the retention.
//!
//! Nothing here blocks writers: partitions are attached and detached, never created or dropped in place, and indexes
//! are built concurrently. There is no default partition, so a stray reading can never make one.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::Client;

use crate::failure::WriteError;
use crate::settings::IngestSettings;

/// Held while partitions are made or dropped; one consumer at a time. The bytes of "tier0par".
const PARTITION_LOCK: i64 = 0x7469_6572_3070_6172;

/// Longest wait for a lock, so that maintenance never queues in front of writers.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '2s'";

/// The layout: all times in microseconds since 1970.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub width_us: i64,
    pub retention_us: i64,
    pub tolerance_us: i64,
}

/// A partition's span, end excluded.
pub type Span = (i64, i64);

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4)
}

impl Layout {
    #[must_use]
    pub fn new(settings: &IngestSettings) -> Self {
        Self {
            width_us: micros(settings.partition_width),
            retention_us: micros(settings.retention),
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

/// An existing partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub name: String,
    pub span: Span,
    /// Whether the per-device index is there and valid.
    pub indexed: bool,
}

/// All partitions, oldest first.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn list(client: &Client) -> Result<Vec<Partition>, WriteError> {
    const SQL: &str = "SELECT c.relname::text, \
          (extract(epoch FROM substring(bound FROM $$FROM \\('([^']+)'\\)$$)::timestamptz) * 1000000)::bigint, \
          (extract(epoch FROM substring(bound FROM $$TO \\('([^']+)'\\)$$)::timestamptz) * 1000000)::bigint, \
          EXISTS (SELECT FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid \
                  WHERE x.indrelid = c.oid AND x.indisvalid AND i.relname = c.relname || '_device') \
        FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid, \
        LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS bound) AS b \
        WHERE h.inhparent = 'device_telemetry'::regclass AND NOT h.inhdetachpending ORDER BY 2";
    let rows = client.query(SQL, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Partition { name: row.get(0), span: (row.get(1), row.get(2)), indexed: row.get(3) })
        .collect())
}

/// Partitions made in one transaction: each locks four relations, and the server's table of locks is finite.
const MADE_AT_ONCE: usize = 64;

/// Makes what is missing so that the cells are covered. Returns how many were made.
///
/// # Errors
/// As classified by [`WriteError`]; what was made before stays, nothing is half made.
pub async fn ensure(client: &mut Client, layout: &Layout, cells: &[i64]) -> Result<usize, WriteError> {
    let mut made = 0;
    loop {
        let transaction = client.transaction().await?;
        transaction.batch_execute(LOCK_TIMEOUT).await?;
        transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&PARTITION_LOCK]).await?;
        let existing: Vec<Span> =
            list(transaction.client()).await?.into_iter().map(|partition| partition.span).collect();
        let missing = layout.missing(&existing, cells);
        for (start, end) in missing.iter().take(MADE_AT_ONCE) {
            transaction.batch_execute(&create_sql(*start, *end)).await?;
        }
        transaction.commit().await?;
        made += missing.len().min(MADE_AT_ONCE);
        if missing.len() <= MADE_AT_ONCE {
            return Ok(made);
        }
    }
}

/// Builds the index for look-ups by device on one partition, beside the writers.
///
/// # Errors
/// As classified by [`WriteError`]; what a failed attempt leaves behind is removed by the next one.
pub async fn index_device(client: &Client, partition: &Partition) -> Result<(), WriteError> {
    let name = &partition.name;
    client.batch_execute(&format!("DROP INDEX CONCURRENTLY IF EXISTS {name}_device")).await?;
    let sql = format!("CREATE INDEX CONCURRENTLY {name}_device ON {name} (device_id, timestamp_utc)");
    Ok(client.batch_execute(&sql).await?)
}

/// Finishes what a process that died while it dropped a partition has left: a detach that is pending (which would make
/// every later one fail), a table that is detached and not dropped.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn finish_drops(client: &Client) -> Result<(), WriteError> {
    const PENDING: &str = "SELECT c.relname::text FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid \
        WHERE h.inhparent = 'device_telemetry'::regclass AND h.inhdetachpending";
    const ORPHANS: &str = "SELECT c.relname::text FROM pg_class c \
        WHERE c.relkind = 'r' AND c.relname ~ '^device_telemetry_\\d{8}_\\d{6}(_\\d{6})?$' \
          AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'device_telemetry'::regclass) \
          AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = c.oid)";
    for row in client.query(PENDING, &[]).await? {
        let name: &str = row.get(0);
        client
            .batch_execute(&format!("ALTER TABLE device_telemetry DETACH PARTITION {name} FINALIZE"))
            .await?;
    }
    for row in client.query(ORPHANS, &[]).await? {
        let name: &str = row.get(0);
        client.batch_execute(&format!("DROP TABLE {name}")).await?;
        tracing::warn!(table = name, "a partition that was detached and not dropped is dropped now");
    }
    Ok(())
}

/// Drops a partition without keeping writers of the others waiting.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn drop_expired(client: &Client, partition: &Partition) -> Result<(), WriteError> {
    let name = &partition.name;
    client
        .batch_execute(&format!("ALTER TABLE device_telemetry DETACH PARTITION {name} CONCURRENTLY"))
        .await?;
    Ok(client.batch_execute(&format!("DROP TABLE {name}")).await?)
}

fn create_sql(start_us: i64, end_us: i64) -> String {
    let name = format!("device_telemetry_{}", stamp(start_us));
    // Made aside and attached: CREATE .. PARTITION OF would lock the parent against writers.
    let mut sql = format!("CREATE TABLE {name} (LIKE device_telemetry INCLUDING ALL);");
    write!(
        sql,
        "ALTER TABLE {name} SET (autovacuum_vacuum_insert_threshold = -1);\
         ALTER TABLE device_telemetry ATTACH PARTITION {name} \
         FOR VALUES FROM (to_timestamp({}::double precision)) TO (to_timestamp({}::double precision))",
        seconds(start_us),
        seconds(end_us)
    )
    .unwrap_or_default();
    sql
}

fn seconds(us: i64) -> String {
    format!("{}.{:06}", us.div_euclid(1_000_000), us.rem_euclid(1_000_000))
}

/// The start as `YYYYMMDD_HHMMSS`, with microseconds when there are any.
fn stamp(us: i64) -> String {
    let time = jiff::Timestamp::from_microsecond(us).unwrap_or_default();
    let text = time.strftime("%Y%m%d_%H%M%S").to_string();
    match us.rem_euclid(1_000_000) {
        0 => text,
        fraction => format!("{text}_{fraction:06}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUT: Layout = Layout { width_us: 60, retention_us: 600, tolerance_us: 60 };

    #[test]
    fn names_are_readable() {
        assert_eq!(stamp(1_770_091_500_000_000), "20260203_040500");
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
