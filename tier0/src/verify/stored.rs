//! What a node has stored, folded device by device in one scan. Reads only, in one snapshot.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use tokio_postgres::{Client, IsolationLevel, Row};
use wire::ledger::{CHECKSUM_SQL, Ledger, Tally};

/// Which rows belong to the run that is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The tables hold this run and nothing else: every row must be in the ledger.
    Everything,
    /// The tables hold earlier runs too. This run's rows are those written by its transactions, the first of which is
    /// given, with a timestamp that the ledger spans (the broker may still have held messages of an earlier run); its
    /// dead letters are those received since its start.
    Run { first_transaction: u32 },
}

/// The next transaction of the primary: asked before a run, it bounds the run's rows.
///
/// # Errors
/// When the primary does not answer.
pub async fn next_transaction(client: &Client) -> anyhow::Result<u32> {
    let row = client
        .query_one("SELECT (pg_snapshot_xmax(pg_current_snapshot())::text::numeric % 4294967296)::text", &[])
        .await
        .context("ask for the next transaction")?;
    row.get::<_, String>(0).parse().context("a transaction number")
}

/// The rows of one node, those in doubt (see [`Ledger::unknown`]) kept apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// All rows in scope, those in doubt included.
    pub rows: u64,
    /// Distinct identities among them.
    pub distinct: u64,
    /// Rows in doubt that are stored. They are not in `devices`.
    pub unacknowledged: u64,
    pub devices: BTreeMap<String, Tally>,
    pub dead_letters: BTreeMap<String, u64>,
    /// Readings older than this, microseconds since 1970, may have been dropped by now: see [`Stored::within`]. `None`:
    /// everything must be there.
    pub horizon_us: Option<i64>,
}

impl Stored {
    /// What was read, under a retention that ends now: older rows are gone by design, and what was never stored cannot be
    /// told from them.
    #[must_use]
    pub fn within(mut self, retention: Option<Duration>) -> Self {
        self.horizon_us = retention.map(|retention| {
            let micros = i64::try_from(retention.as_micros()).unwrap_or(i64::MAX);
            Timestamp::now().as_microsecond().saturating_sub(micros)
        });
        self
    }
}

/// Microseconds since 1970 of a timestamptz, exact: a double holds them up to the year 2041 with less than half a
/// microsecond of error, and the cast rounds. The exact numeric way (`extract`) takes four times as long.
const MICROSECONDS: &str = "(date_part('epoch', timestamp_utc) * 1000000)::bigint";

/// Reads one node.
///
/// # Errors
/// When a query fails, for instance because the tables do not exist.
pub async fn read(client: &mut Client, ledger: &Ledger, scope: Scope) -> anyhow::Result<Stored> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
        .context("begin")?;
    let (from, to) = span(ledger, scope)?;
    let (ids, times): (Vec<&str>, Vec<i64>) =
        ledger.unknown.iter().map(|(id, us)| (id.as_str(), *us)).unzip();

    // `age` counts back from now, so that the comparison holds when the numbers wrap around.
    let written = match scope {
        Scope::Everything => String::new(),
        Scope::Run { first_transaction } => {
            format!("AND age(device_telemetry.xmin) <= age('{first_transaction}'::xid)")
        }
    };
    let doubt = if ids.is_empty() {
        ""
    } else {
        "WHERE NOT EXISTS (SELECT FROM unnest($3::text[], $4::bigint[]) AS doubt (id, at) \
         WHERE doubt.id = device_id AND doubt.at = us)"
    };
    let tallies = format!(
        "SELECT device_id, count(*), min(us), max(us), {CHECKSUM_SQL} \
         FROM (SELECT device_id, {MICROSECONDS} AS us FROM device_telemetry \
               WHERE timestamp_utc BETWEEN $1 AND $2 {written}) AS reading {doubt} GROUP BY device_id"
    );
    let rows = if ids.is_empty() {
        transaction.query(&tallies, &[&from, &to]).await
    } else {
        transaction.query(&tallies, &[&from, &to, &ids, &times]).await
    }
    .context("fold the stored readings")?;
    let devices = rows.iter().map(tally).collect::<anyhow::Result<BTreeMap<_, _>>>()?;

    let moments = times.iter().map(|us| Timestamp::from_microsecond(*us)).collect::<Result<Vec<_>, _>>();
    let moments = moments.context("a timestamp in doubt")?;
    let unacknowledged = count(
        &transaction
            .query_one(
                &format!(
                    "SELECT count(*) FROM device_telemetry JOIN unnest($1::text[], $2::timestamptz[]) \
                     AS doubt (id, at) ON doubt.id = device_id AND doubt.at = timestamp_utc \
                     WHERE timestamp_utc BETWEEN $3 AND $4 {written}"
                ),
                &[&ids, &moments, &from, &to],
            )
            .await
            .context("look up the readings in doubt")?,
    )?;

    // In the order of the primary key the scan needs neither a sort nor a hash table of every identity.
    transaction
        .batch_execute(
            "SET LOCAL enable_hashagg = off; SET LOCAL enable_sort = off; SET LOCAL enable_seqscan = off",
        )
        .await
        .context("plan by index")?;
    let distinct = count(
        &transaction
            .query_one(
                &format!(
                    "SELECT count(*) FROM (SELECT DISTINCT timestamp_utc, device_id FROM device_telemetry \
                     WHERE timestamp_utc BETWEEN $1 AND $2 {written}) AS identity"
                ),
                &[&from, &to],
            )
            .await
            .context("count distinct identities")?,
    )?;

    let since = match scope {
        Scope::Everything => Timestamp::UNIX_EPOCH,
        Scope::Run { .. } => Timestamp::from_microsecond(ledger.started_us).context("start of the run")?,
    };
    let letters = transaction
        .query("SELECT reason, count(*) FROM dead_letters WHERE source <> 'rabbitmq' AND received_at >= $1 GROUP BY reason", &[&since])
        .await
        .context("count dead letters")?;
    let dead_letters = letters
        .iter()
        .map(|row| Ok((row.get(0), u64::try_from(row.get::<_, i64>(1)).context("a count")?)))
        .collect::<anyhow::Result<_>>()?;
    transaction.commit().await.context("end the look")?;
    let rows = devices.values().map(|tally| tally.count).sum::<u64>() + unacknowledged;
    Ok(Stored { rows, distinct, unacknowledged, devices, dead_letters, horizon_us: None })
}

/// The first and last timestamp to look at.
fn span(ledger: &Ledger, scope: Scope) -> anyhow::Result<(Timestamp, Timestamp)> {
    // Postgres knows no year beyond this that we could ask for; no reading of ours is near either end.
    const ALWAYS: (i64, i64) = (-62_000_000_000_000_000, 250_000_000_000_000_000);
    let (from, to) = match scope {
        Scope::Everything => ALWAYS,
        Scope::Run { .. } => {
            let tallies = ledger.devices.values().filter(|tally| tally.count > 0);
            let times = tallies.flat_map(|tally| [tally.first_us, tally.last_us]);
            let times: Vec<i64> = times.chain(ledger.unknown.iter().map(|(_, us)| *us)).collect();
            let last = times.iter().max().copied().unwrap_or(ledger.ended_us);
            (times.iter().min().copied().unwrap_or(ledger.started_us), last)
        }
    };
    Ok((
        Timestamp::from_microsecond(from).context("first timestamp of the ledger")?,
        Timestamp::from_microsecond(to).context("last timestamp of the ledger")?,
    ))
}

fn tally(row: &Row) -> anyhow::Result<(String, Tally)> {
    let count = u64::try_from(row.get::<_, i64>(1)).context("a count")?;
    let tally = Tally { count, first_us: row.get(2), last_us: row.get(3), checksum: row.get(4) };
    Ok((row.get(0), tally))
}

fn count(row: &Row) -> anyhow::Result<u64> {
    u64::try_from(row.get::<_, i64>(0)).context("a count")
}
