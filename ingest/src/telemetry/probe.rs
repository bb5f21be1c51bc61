//! What the table of readings is offered to find out whether it still takes what it took before: its newest rows, a
//! microsecond later, and such a row at the times of the batch. A partition of its own may be locked, damaged or full while
//! the newest one takes everything.

use std::collections::BTreeMap;

use deadpool_postgres::Client;
use tokio_postgres::types::ToSql;

use super::COLUMNS;
use crate::failure::WriteError;

/// Rows that are offered: of several devices, so that a rule about one of them is not taken for a rule about all.
const ROWS: usize = 20;
/// The batch's times are tried once for each of these; a partition is seldom narrower.
const GRID_US: i64 = 60_000_000;
/// Times of the batch that are tried, at most. When a batch is of more, its halves are asked more closely.
const PLACES: usize = 64;

/// A time for each partition that rows of these times are in, about; the newest first.
pub(super) fn places(times_us: impl Iterator<Item = i64>) -> Vec<i64> {
    let cells: BTreeMap<i64, i64> = times_us.map(|us| (us.div_euclid(GRID_US), us)).collect();
    let step = cells.len().div_ceil(PLACES).max(1);
    cells.into_values().rev().step_by(step).collect()
}

/// # Errors
/// The table's.
pub(super) async fn offer(client: &Client, places_us: &[i64]) -> Result<(), WriteError> {
    client.batch_execute("SAVEPOINT newest").await?;
    match offer_newest(client).await {
        // There is no partition for the made-up row yet: nothing speaks against the table.
        Err(WriteError::MissingPartition) => client.batch_execute("ROLLBACK TO newest").await?,
        outcome => outcome?,
    }
    offer_at(client, places_us).await
}

async fn offer_newest(client: &Client) -> Result<(), WriteError> {
    // A table without rows is offered a made-up one. A row on the last microsecond of a second may have no partition a
    // microsecond later, so it stays as it is.
    let sql = format!(
        "WITH stored AS (SELECT {COLUMNS} FROM public.device_telemetry ORDER BY timestamp_utc DESC LIMIT {ROWS}), \
         known AS (SELECT {COLUMNS} FROM stored UNION ALL \
           SELECT 'tier0-probe', 'probe', 'probe', now(), NULL, '{{}}'::jsonb, NULL, NULL, NULL \
           WHERE NOT EXISTS (SELECT FROM stored)), \
         offered AS (INSERT INTO public.device_telemetry ({COLUMNS}) \
           SELECT device_id, device_type, site_id, \
             CASE WHEN extract(microseconds FROM timestamp_utc)::bigint % 1000000 = 999999 THEN timestamp_utc \
                  ELSE timestamp_utc + interval '1 microsecond' END, \
             firmware, metrics, status, location, tags FROM known \
           ON CONFLICT DO NOTHING RETURNING 1) \
         SELECT count(*) FROM offered"
    );
    if client.query_one(&sql, &[]).await?.get::<_, i64>(0) == 0 {
        let message = "device_telemetry reports success and keeps no row: a trigger, rule or policy?";
        return Err(WriteError::Unknown(message.into()));
    }
    Ok(())
}

/// A row as it is stored, at each of these times.
async fn offer_at(client: &Client, places_us: &[i64]) -> Result<(), WriteError> {
    const KNOWN: &str = "SELECT device_id, device_type, site_id, firmware, metrics::text, status::text, location::text, tags::text \
        FROM public.device_telemetry ORDER BY timestamp_utc DESC LIMIT 1";
    // One statement for each, with values alone: it locks no partition but its own.
    let sql = format!(
        "INSERT INTO public.device_telemetry ({COLUMNS}) \
         VALUES ($1, $2, $3, 'epoch'::timestamptz + $4::bigint * interval '1 microsecond', $5, \
             $6::text::jsonb, $7::text::jsonb, $8::text::jsonb, $9::text::jsonb) ON CONFLICT DO NOTHING"
    );
    let known = client.query_opt(KNOWN, &[]).await?;
    let text = |column: usize, made_up: Option<&'static str>| match &known {
        Some(row) => row.get::<_, Option<&str>>(column),
        None => made_up,
    };
    let (device, kind, site) = (text(0, Some("tier0-probe")), text(1, Some("probe")), text(2, Some("probe")));
    let (firmware, metrics) = (text(3, None), text(4, Some("{}")));
    let (status, location, tags) = (text(5, None), text(6, None), text(7, None));
    let insert = client.prepare(&sql).await?;
    for us in places_us {
        let us = if us % 1_000_000 == 999_999 { *us } else { us + 1 };
        client.batch_execute("SAVEPOINT place").await?;
        let values: [&(dyn ToSql + Sync); 9] =
            [&device, &kind, &site, &us, &firmware, &metrics, &status, &location, &tags];
        match client.execute(&insert, &values).await.map_err(WriteError::from) {
            // Made when the batch is tried.
            Err(WriteError::MissingPartition) => client.batch_execute("ROLLBACK TO place").await?,
            outcome => drop(outcome?),
        }
        client.batch_execute("RELEASE place").await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_minute_of_a_batch_is_tried_once_and_not_too_many() {
        let minute = |n: i64| n * GRID_US;
        assert_eq!(places([minute(3) + 5, minute(1), minute(3) + 7, minute(1) + 9].into_iter()).len(), 2);
        assert_eq!(places(std::iter::empty()), [0_i64; 0]);
        let many = places((0..1_000).map(minute));
        assert!(many.len() <= PLACES && many.len() > PLACES / 2, "{}", many.len());
        assert_eq!(many[0], minute(999));
    }
}
