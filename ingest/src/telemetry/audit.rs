//! Which keys of committed readings are read again, and how.

use super::Batch;
use crate::audit::key::{Chosen, Key, choose};
use crate::failure::WriteError;
use crate::telemetry::merge::time_literal;

/// One of the first, one of the middle, one of the last rows that are in the table.
pub(super) fn sample(batch: &Batch, random: u64) -> Chosen {
    let fresh = batch.fresh.len();
    choose(fresh + batch.suspects.len(), random, |row| {
        if batch.refused_rows.contains(&row) {
            None
        } else if row < fresh {
            batch.fresh.key(row)
        } else {
            batch.suspects.key(row - fresh)
        }
    })
}

/// Each key by the primary key's index, in the partitions of these times only.
pub(super) async fn missing(client: &tokio_postgres::Client, keys: &[Key]) -> Result<Vec<usize>, WriteError> {
    let times = || keys.iter().map(|key| key.at_us);
    let (Some(least), Some(greatest)) = (times().min(), times().max()) else { return Ok(Vec::new()) };
    let sql = format!(
        "SELECT key.number - 1 FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS key (id, us, number) \
         LEFT JOIN LATERAL (SELECT true AS there FROM public.device_telemetry t \
           WHERE t.timestamp_utc = 'epoch'::timestamptz + key.us * interval '1 microsecond' \
             AND t.device_id = key.id COLLATE \"C\" AND t.timestamp_utc BETWEEN {} AND {} LIMIT 1) AS stored ON true \
         WHERE stored.there IS NULL ORDER BY 1",
        time_literal(least),
        time_literal(greatest)
    );
    let ids: Vec<&str> = keys.iter().map(|key| key.id.as_ref()).collect();
    let times: Vec<i64> = times().collect();
    let rows = client.query(&sql, &[&ids, &times]).await?;
    Ok(rows.iter().filter_map(|row| usize::try_from(row.get::<_, i64>(0)).ok()).collect())
}
