//! Sessions and reports on their way into their tables: statements, and rows as a binary COPY has them.

use std::sync::LazyLock;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use deadpool_postgres::Client;
use futures_util::SinkExt;
use jiff::Timestamp;

use super::{Batch, Folded};
use crate::copy;
use crate::failure::WriteError;
use crate::session::Detail;
use crate::transaction;

/// The columns of the staging table, in the order they are encoded.
const COLUMNS: &str = "session_id, user_id, username, connection_status, region, ip_address, login_time, logout_at, \
    last_activity, username_at, region_at, ip_address_at";
const FIELDS: i16 = 12;

/// As the table is, but without NOT NULL and defaults, and without what others have added to it.
pub(super) static STAGING: LazyLock<String> = LazyLock::new(|| {
    format!(
        "CREATE TEMP TABLE IF NOT EXISTS session_staging ON COMMIT DELETE ROWS AS \
         SELECT {COLUMNS} FROM public.user_sessions WITH NO DATA"
    )
});

static COPY: LazyLock<String> =
    LazyLock::new(|| format!("COPY pg_temp.session_staging ({COLUMNS}) FROM STDIN BINARY"));

/// Begins a transaction that has the staging table.
pub(super) fn begin(patience: Duration) -> String {
    format!("{}; {}", transaction::begin(patience), *STAGING)
}

/// [`crate::session::Session::merge`] in SQL. Rows are locked in the order of their ids, so that two writers never wait for one another.
/// A row that would stay as it is is not written.
static MERGE: LazyLock<String> = LazyLock::new(|| {
    const RANK: &str = "connection_status WHEN 'active' THEN 0 WHEN 'idle' THEN 1 ELSE 2 END";
    let newer = format!(
        "(excluded.last_activity, CASE excluded.{RANK}, excluded.user_id) > (s.last_activity, CASE s.{RANK}, s.user_id)"
    );
    let newer_detail = |name: &str| {
        format!(
            "excluded.{name} IS NOT NULL AND \
             (s.{name} IS NULL OR (excluded.{name}_at, excluded.{name}) > (s.{name}_at, s.{name}))"
        )
    };
    let pick = |column: &str, newer: &str| {
        format!("{column} = CASE WHEN {newer} THEN excluded.{column} ELSE s.{column} END")
    };
    let details: Vec<String> = ["username", "region", "ip_address"]
        .into_iter()
        .map(|name| {
            let newer = newer_detail(name);
            format!("{}, {}", pick(name, &newer), pick(&format!("{name}_at"), &newer))
        })
        .collect();
    format!(
        "INSERT INTO public.user_sessions AS s ({COLUMNS}, logout_time) \
         SELECT {COLUMNS}, CASE WHEN connection_status = 'disconnected' THEN logout_at END \
         FROM pg_temp.session_staging ORDER BY session_id \
         ON CONFLICT (session_id) DO UPDATE SET {}, {}, {}, {}, \
             login_time = GREATEST(s.login_time, excluded.login_time), \
             logout_at = GREATEST(s.logout_at, excluded.logout_at), \
             logout_time = CASE WHEN CASE WHEN {newer} THEN excluded.connection_status \
                                          ELSE s.connection_status END = 'disconnected' \
                                THEN GREATEST(s.logout_at, excluded.logout_at) END \
         WHERE {newer} OR ({}) OR ({}) OR ({}) \
             OR excluded.login_time > coalesce(s.login_time, '-infinity') \
             OR excluded.logout_at > coalesce(s.logout_at, '-infinity')",
        pick("user_id", &newer),
        pick("connection_status", &newer),
        pick("last_activity", &newer),
        details.join(", "),
        newer_detail("username"),
        newer_detail("region"),
        newer_detail("ip_address"),
    )
});

const SITES: &str = "INSERT INTO public.site_activity AS s (site_id, timestamp_utc, metrics) \
    SELECT DISTINCT ON (timestamp_utc, site_id) site_id, timestamp_utc, metrics::jsonb \
    FROM unnest($1::text[], $2::timestamptz[], $3::text[]) AS report (site_id, timestamp_utc, metrics) \
    ORDER BY timestamp_utc, site_id, metrics::jsonb DESC \
    ON CONFLICT (timestamp_utc, site_id) DO UPDATE SET metrics = excluded.metrics WHERE excluded.metrics > s.metrics";

impl Batch {
    /// Merges sessions `from..to`; returns how many rows changed.
    pub(super) async fn merge(&self, client: &Client, from: usize, to: usize) -> Result<usize, WriteError> {
        if from == to {
            return Ok(0);
        }
        let (copy, merge) = tokio::try_join!(client.prepare_cached(&COPY), client.prepare_cached(&MERGE))?;
        let sink = client.copy_in(&copy).await?;
        futures_util::pin_mut!(sink);
        let feed = async {
            for message in copy::messages(self.encode(from, to)) {
                sink.feed(message).await?;
            }
            Ok::<(), tokio_postgres::Error>(())
        };
        let fed = feed.await;
        // A server that refuses a row stops reading; its reason comes with the end of the COPY.
        transaction::finish_copy(sink).await?;
        fed?;
        let changed = client.execute(&merge, &[]).await?;
        // A second range in the same transaction starts from an empty table.
        if (from, to) != (0, self.sessions.len()) {
            client.batch_execute("TRUNCATE pg_temp.session_staging").await?;
        }
        Ok(usize::try_from(changed).unwrap_or(usize::MAX))
    }

    fn encode(&self, from: usize, to: usize) -> Bytes {
        let sessions = self.sessions.get(from..to).unwrap_or_default();
        let mut buffer = BytesMut::with_capacity(sessions.len() * 256);
        buffer.put_slice(copy::HEADER);
        for Folded { session_id, session } in sessions {
            copy::row(&mut buffer, FIELDS);
            copy::text(&mut buffer, session_id);
            copy::text(&mut buffer, &session.newest.user_id);
            optional_text(&mut buffer, &session.username);
            copy::text(&mut buffer, session.newest.status.as_str());
            optional_text(&mut buffer, &session.region);
            optional_text(&mut buffer, &session.ip_address);
            optional_time(&mut buffer, session.login_us);
            optional_time(&mut buffer, session.logout_us);
            copy::timestamptz(&mut buffer, session.newest.at_us);
            for detail in [&session.username, &session.region, &session.ip_address] {
                optional_time(&mut buffer, detail.as_ref().map(|(at_us, _)| *at_us));
            }
        }
        buffer.put_slice(copy::TRAILER);
        buffer.freeze()
    }

    /// Stores reports `from..to`; returns how many rows are new or changed.
    pub(super) async fn insert_reports(
        &self,
        client: &Client,
        from: usize,
        to: usize,
    ) -> Result<usize, WriteError> {
        let reports = self.reports.get(from..to).unwrap_or_default();
        if reports.is_empty() {
            return Ok(0);
        }
        let sites: Vec<&str> = reports.iter().map(|report| report.site_id.as_ref()).collect();
        let times: Vec<Timestamp> = reports.iter().map(|report| report.at).collect();
        let metrics: Vec<&str> = reports.iter().map(|report| report.metrics.as_ref()).collect();
        let statement = client.prepare_cached(SITES).await?;
        let stored = client.execute(&statement, &[&sites, &times, &metrics]).await?;
        Ok(usize::try_from(stored).unwrap_or(usize::MAX))
    }
}

fn optional_text(buffer: &mut BytesMut, detail: &Detail) {
    match detail {
        Some((_, text)) => copy::text(buffer, text),
        None => copy::null(buffer),
    }
}

fn optional_time(buffer: &mut BytesMut, at_us: Option<i64>) {
    match at_us {
        Some(at_us) => copy::timestamptz(buffer, at_us),
        None => copy::null(buffer),
    }
}
