//! Storing readings of which some may be stored already: through a temporary table, in the connection's transaction.
//!
//! What is stored already and equal is a duplicate. What has the same identity and another content is never dropped in
//! silence: it is a conflict, or, if the settings say so, its metrics are joined into the stored row. And what is in the
//! table neither before nor after was swallowed by a trigger, a rule or a policy.

use deadpool_postgres::Client;

use super::COLUMNS;
use super::encoded::Encoded;
use crate::failure::WriteError;
use crate::settings::SameIdentity;
use crate::staging;

/// Metrics that come one by one make as many rounds as there are readings of one identity in a batch. Those beyond are
/// conflicts.
const MAX_JOINS: usize = 64;

/// A row that metrics are joined into is not grown beyond this: each join writes it anew.
const MAX_JOINED_BYTES: usize = 32 << 10;

/// What became of rows; numbers are those of the batch.
#[derive(Debug, Default)]
pub(super) struct Merged {
    pub(super) rows: usize,
    pub(super) joined: usize,
    /// Another reading with this identity is stored.
    pub(super) conflicts: Vec<usize>,
    /// Not in the table although the database reported success.
    pub(super) missing: Vec<usize>,
}

/// A stored row is looked up by its key for each row of the staging table: a join might read whole partitions. The bounds
/// let the server plan for the partitions of this batch only.
fn stored(bounds: &str) -> String {
    format!(
        "LATERAL (SELECT t.* FROM public.device_telemetry t \
         WHERE t.timestamp_utc = s.timestamp_utc AND t.device_id = s.device_id AND {bounds} LIMIT 1)"
    )
}

const EQUAL: &str = "(s.device_type, s.site_id, s.firmware, s.metrics, s.status, s.location, s.tags) \
    IS NOT DISTINCT FROM (t.device_type, t.site_id, t.firmware, t.metrics, t.status, t.location, t.tags)";

/// Everything the row of `s` says stands in the row of `t`.
const CONTAINED: &str = "s.device_type = t.device_type AND s.site_id = t.site_id \
    AND coalesce(s.firmware = t.firmware, s.firmware IS NULL) AND coalesce(s.status = t.status, s.status IS NULL) \
    AND coalesce(s.location = t.location, s.location IS NULL) AND coalesce(s.tags = t.tags, s.tags IS NULL) \
    AND NOT EXISTS (SELECT FROM jsonb_each(s.metrics) AS e WHERE (t.metrics -> e.key) IS DISTINCT FROM e.value)";

/// Nothing the row of `s` says contradicts the row of `t`.
const COMPATIBLE: &str = "s.device_type = t.device_type AND s.site_id = t.site_id \
    AND coalesce(s.firmware = t.firmware, true) AND coalesce(s.status = t.status, true) \
    AND coalesce(s.location = t.location, true) AND coalesce(s.tags = t.tags, true) \
    AND NOT EXISTS (SELECT FROM jsonb_each(s.metrics) AS e WHERE t.metrics -> e.key <> e.value)";

impl Encoded {
    /// Stores rows `from..to` that are not there yet. ON CONFLICT waits for whoever has changed a stored row in a transaction that
    /// is open; `by_look` those that are stored are left out first.
    pub(super) async fn merge(
        &self,
        client: &Client,
        (from, to): (usize, usize),
        same_identity: SameIdentity,
        by_look: bool,
    ) -> Result<Merged, WriteError> {
        if from == to {
            return Ok(Merged::default());
        }
        make_staging(client).await?;
        let sent = self.copy(client, "pg_temp.telemetry_staging", from, to).await?;
        let bounds = self.bounds(from, to);
        let left_out = if by_look {
            format!("LEFT JOIN {} AS t ON true WHERE t.device_id IS NULL", stored(&bounds))
        } else {
            String::new()
        };
        let columns: Vec<String> = COLUMNS.split(", ").map(|column| format!("s.{column}")).collect();
        let insert = format!(
            "INSERT INTO public.device_telemetry ({COLUMNS}) SELECT {} FROM pg_temp.telemetry_staging AS s {left_out} \
             ORDER BY s.tier0_number ON CONFLICT DO NOTHING",
            columns.join(", ")
        );
        let inserted = client.execute(&insert, &[]).await?;
        let mut merged =
            Merged { rows: usize::try_from(inserted).unwrap_or(usize::MAX), ..Merged::default() };
        if inserted == sent {
            return Ok(merged);
        }
        if same_identity == SameIdentity::Merge {
            merged.joined = join(client, &bounds).await?;
        }
        // In a statement of its own: it sees what other writers have committed meanwhile.
        let same = if same_identity == SameIdentity::Merge { CONTAINED } else { EQUAL };
        let look = format!(
            "SELECT s.tier0_number - first.number, t.device_id IS NULL \
             FROM (SELECT min(tier0_number) AS number FROM pg_temp.telemetry_staging) AS first, \
                  pg_temp.telemetry_staging AS s LEFT JOIN {} AS t ON true \
             WHERE t.device_id IS NULL OR NOT ({same}) ORDER BY 1",
            stored(&bounds)
        );
        for row in client.query(&look, &[]).await? {
            let number = from + usize::try_from(row.get::<_, i64>(0)).unwrap_or_default();
            if row.get(1) { &mut merged.missing } else { &mut merged.conflicts }.push(number);
        }
        Ok(merged)
    }

    /// The times of rows `from..to` as a condition on `t`, with literals: parameters would be unknown to the planner.
    fn bounds(&self, from: usize, to: usize) -> String {
        let times = || self.timestamps().skip(from).take(to - from);
        let (least, greatest) = (times().min().unwrap_or_default(), times().max().unwrap_or_default());
        format!("t.timestamp_utc BETWEEN {} AND {}", time_literal(least), time_literal(greatest))
    }
}

/// Joins what can be joined into stored rows; returns how many readings that were. One reading of each identity a round.
async fn join(client: &Client, bounds: &str) -> Result<usize, WriteError> {
    let round = format!(
        "WITH candidate AS (\
           SELECT DISTINCT ON (s.timestamp_utc, s.device_id) s.* \
           FROM pg_temp.telemetry_staging AS s, {} AS t \
           WHERE {COMPATIBLE} AND NOT ({CONTAINED}) AND pg_column_size(t.metrics) + pg_column_size(s.metrics) < {MAX_JOINED_BYTES} \
           ORDER BY s.timestamp_utc, s.device_id, s.tier0_number) \
         UPDATE public.device_telemetry AS t \
         SET metrics = t.metrics || s.metrics, firmware = coalesce(t.firmware, s.firmware), \
             status = coalesce(t.status, s.status), location = coalesce(t.location, s.location), tags = coalesce(t.tags, s.tags) \
         FROM candidate AS s \
         WHERE t.timestamp_utc = s.timestamp_utc AND t.device_id = s.device_id AND {bounds} AND {COMPATIBLE}",
        stored(bounds)
    );
    // The planner knows nothing of the temporary table's size: it must not read whole partitions for a few rows.
    client.batch_execute("SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off").await?;
    let mut joined = 0;
    for _ in 0..MAX_JOINS {
        let updated = client.execute(&round, &[]).await?;
        if updated == 0 {
            break;
        }
        joined += usize::try_from(updated).unwrap_or(usize::MAX);
    }
    Ok(joined)
}

/// Makes the table that rows are merged through: empty, and numbered in the order of the COPY. `telemetry_columns` never has a
/// row: a table that is made of a query has the types and collations of its columns, and neither NOT NULL nor defaults.
///
/// # Errors
/// As [`staging::make`].
pub(super) async fn make_staging(client: &Client) -> Result<(), WriteError> {
    let sql = format!(
        "CREATE TEMP TABLE IF NOT EXISTS telemetry_columns AS SELECT {COLUMNS} FROM public.device_telemetry WITH NO DATA; \
         CREATE TEMP TABLE IF NOT EXISTS telemetry_staging \
           (LIKE pg_temp.telemetry_columns, tier0_number bigint GENERATED ALWAYS AS IDENTITY) ON COMMIT DELETE ROWS; \
         DELETE FROM pg_temp.telemetry_staging"
    );
    staging::make(client, &sql).await
}

/// A constant for the planner, whatever the session's time zone.
pub(super) fn time_literal(us: i64) -> String {
    let time = jiff::Timestamp::from_microsecond(us).unwrap_or_default();
    format!("'{}+00'::timestamptz", time.strftime("%Y-%m-%d %H:%M:%S%.6f"))
}
