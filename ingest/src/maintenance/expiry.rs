//! What may be dropped for its age. Never by the word of one clock: this machine's and the primary's must both say so, and
//! devices must have sent readings that are newer by the whole retention. When no device sends any more, nothing is
//! dropped; a clock that is ahead finds no reading that bears it out.
//!
//! A fleet that has become smaller than that has no such witnesses any more. Then a partition goes when nothing has been
//! written to it for the whole retention by the monotonic clock ([`Quiet`]): what it holds is older than that, whatever any
//! clock says, and one device that lies can neither bring that about nor hasten it.

use std::time::Duration;

use tokio_postgres::Client;

use super::quiet::Quiet;
use crate::clock::{Look, State};
use crate::failure::WriteError;
use crate::partitions::{Layout, Listing, Partition, Table, time};

/// Dropped at one look, at most. After an outage of many hours 150 a minute still catch up.
const AT_ONCE: usize = 5;
/// The newest partitions, which are never dropped whatever the clocks say.
const KEPT: usize = 2;
/// So many devices bear a time out, or all of those that the partition holds, if they are fewer: one with a wrong clock
/// proves nothing.
const WITNESSES: usize = 3;
/// Reports of web sites deleted at one look.
const REPORTS_AT_ONCE: i64 = 5_000;

/// The time that both clocks are past.
#[derive(Debug, Clone, Copy)]
pub(super) struct Believed {
    now_us: i64,
}

impl Believed {
    /// `None` while the clocks disagree.
    pub(super) fn of(look: &Look) -> Option<Self> {
        match look.state {
            State::Unknown | State::Apart => None,
            State::Agreed | State::Doubted => {
                look.primary_us.map(|primary_us| Self { now_us: primary_us.min(look.own_us) })
            }
        }
    }
}

/// Those of the partitions that both clocks say are too old, oldest first, at most a few.
fn candidates<'l>(layout: &Layout, listing: &'l Listing, believed: &Believed) -> Vec<&'l Partition> {
    let limit = believed.now_us - layout.retention_us;
    let old = listing.partitions.len().saturating_sub(KEPT);
    listing.partitions.iter().take(old).filter(|partition| partition.span.1 <= limit).take(AT_ONCE).collect()
}

/// Those that devices bear out as well, or a long quiet.
pub(super) async fn expired<'l>(
    client: &Client,
    layout: &Layout,
    listing: &'l Listing,
    believed: &Believed,
    quiet: &Quiet,
) -> Result<Vec<&'l Partition>, WriteError> {
    let mut expired = Vec::new();
    for partition in candidates(layout, listing, believed) {
        let rests = i64::try_from(quiet.duration(partition).as_micros()).unwrap_or(i64::MAX);
        if rests >= layout.retention_us + layout.tolerance_us
            || is_borne_out(client, layout, partition).await?
        {
            expired.push(partition);
        }
    }
    Ok(expired)
}

async fn is_borne_out(client: &Client, layout: &Layout, partition: &Partition) -> Result<bool, WriteError> {
    let needed = match layout.table {
        Table::DeviceTelemetry => devices(client, &partition.quoted(), "true").await?,
        Table::DeadLetters => devices(client, NEWEST, "true").await?,
    };
    let newer = format!("timestamp_utc >= {}", time(partition.span.1 + layout.retention_us));
    Ok(devices(client, "public.device_telemetry", &newer).await? >= needed.max(1))
}

/// How long ago the oldest partition should have gone, by the time that both clocks are past.
pub(super) fn overdue(layout: &Layout, listing: &Listing, believed: &Believed) -> Duration {
    let old = listing.partitions.len().saturating_sub(KEPT);
    let oldest = listing.partitions.iter().take(old).next();
    let us = oldest.map_or(0, |oldest| believed.now_us - layout.retention_us - oldest.span.1);
    Duration::from_micros(u64::try_from(us).unwrap_or(0))
}

/// Bounded: the newest readings, whenever they were sent.
const NEWEST: &str =
    "(SELECT device_id FROM public.device_telemetry ORDER BY timestamp_utc DESC LIMIT 10000) AS newest";

/// Devices that have readings there, counted up to [`WITNESSES`]. Reads until it has found them, usually one row for each.
async fn devices(client: &Client, from: &str, condition: &str) -> Result<usize, WriteError> {
    let sql = format!("SELECT device_id FROM {from} WHERE {condition} AND device_id <> ALL($1) LIMIT 1");
    let mut found: Vec<String> = Vec::new();
    while found.len() < WITNESSES {
        let Some(row) = client.query_opt(&sql, &[&found]).await? else { break };
        found.push(row.get(0));
    }
    Ok(found.len())
}

/// Deletes reports of web sites that are older than newer ones by the retention, some at a time.
pub(super) async fn delete_reports(
    client: &Client,
    believed: &Believed,
    retention_us: i64,
) -> Result<u64, WriteError> {
    // An hour less: sites report every minute or so.
    let newer = time(believed.now_us - 3_600_000_000);
    let limit = time(believed.now_us - retention_us);
    let sql = format!(
        "DELETE FROM public.site_activity WHERE ctid = ANY (ARRAY( \
             SELECT ctid FROM public.site_activity WHERE timestamp_utc < {limit} ORDER BY timestamp_utc LIMIT {REPORTS_AT_ONCE})) \
         AND EXISTS (SELECT FROM public.site_activity WHERE timestamp_utc >= {newer})"
    );
    Ok(client.execute(&sql, &[]).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout =
        Layout { table: Table::DeviceTelemetry, width_us: 10, retention_us: 100, tolerance_us: 5 };

    fn listing(spans: impl Iterator<Item = (i64, i64)>) -> Listing {
        let partitions = spans.map(|span| Partition {
            schema: "public".into(),
            name: format!("p_{}", span.0),
            span,
            indexed: false,
            marked: false,
        });
        Listing { partitions: partitions.collect(), default: None }
    }

    fn look(own_us: i64, primary_us: i64, state: State) -> Look {
        Look { own_us, primary_us: Some(primary_us), state }
    }

    fn starts(found: &[&Partition]) -> Vec<i64> {
        found.iter().map(|partition| partition.span.0).collect()
    }

    #[test]
    fn the_slower_clock_decides_a_few_go_at_once_and_the_newest_never_do() {
        let listing = listing((0..20).map(|n| (n * 10, n * 10 + 10)));
        for (own, primary, expected) in [
            (205, 205, vec![0, 10, 20, 30, 40]),
            (1_000_000, 120, vec![0, 10]),
            (120, 1_000_000, vec![0, 10]),
            (105, 105, vec![]),
        ] {
            let believed = Believed::of(&look(own, primary, State::Agreed)).unwrap();
            assert_eq!(starts(&candidates(&LAYOUT, &listing, &believed)), expected, "{own} {primary}");
            let overdue = overdue(&LAYOUT, &listing, &believed).as_micros();
            assert_eq!(overdue, u128::try_from(own.min(primary) - 110).unwrap_or(0), "{own} {primary}");
        }
        assert!(Believed::of(&look(205, 205, State::Apart)).is_none());
        assert!(Believed::of(&look(205, 205, State::Unknown)).is_none());
    }

    #[test]
    fn two_partitions_always_stay() {
        let listing = listing([(0, 10), (10, 20), (20, 30)].into_iter());
        let believed = Believed::of(&look(1_000_000, 1_000_000, State::Agreed)).unwrap();
        assert_eq!(starts(&candidates(&LAYOUT, &listing, &believed)), [0]);
    }
}
