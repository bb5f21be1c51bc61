//! A batch of session events: folded to one row per session while it is filled, merged into the table in one statement.
//!
//! Site reports in it go to `site_activity`; of two reports of one site and time the greater is kept, whichever came first.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::LazyLock;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use deadpool_postgres::Client;
use futures_util::SinkExt;
use jiff::Timestamp;
use tokio::time::Instant;

use super::{Detail, Session, decode};
use crate::batch::{self, Committed, Deliveries, Path, in_time};
use crate::copy;
use crate::dead_letter::DeadLetter;
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::isolation::{Isolated, Range, Rows, isolate};
use crate::reading::{Rejection, Rules};

/// The columns of the staging table, in the order they are encoded.
const COLUMNS: &str = "session_id, user_id, username, connection_status, region, ip_address, login_time, logout_at, \
    last_activity, username_at, region_at, ip_address_at";
const FIELDS: i16 = 12;

const BEGIN: &str = "BEGIN; CREATE TEMP TABLE IF NOT EXISTS session_staging \
    (LIKE user_sessions INCLUDING DEFAULTS) ON COMMIT DELETE ROWS";

const COPY: &str = "COPY session_staging (session_id, user_id, username, connection_status, region, ip_address, \
    login_time, logout_at, last_activity, username_at, region_at, ip_address_at) FROM STDIN BINARY";

/// [`Session::merge`] in SQL. Rows are locked in the order of their ids, so that two writers never wait for one another.
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
        "INSERT INTO user_sessions AS s ({COLUMNS}, logout_time) \
         SELECT {COLUMNS}, CASE WHEN connection_status = 'disconnected' THEN logout_at END \
         FROM session_staging ORDER BY session_id \
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

const SITES: &str = "INSERT INTO site_activity AS s (site_id, timestamp_utc, metrics) \
    SELECT DISTINCT ON (timestamp_utc, site_id) site_id, timestamp_utc, metrics::jsonb \
    FROM unnest($1::text[], $2::timestamptz[], $3::text[]) AS report (site_id, timestamp_utc, metrics) \
    ORDER BY timestamp_utc, site_id, metrics::jsonb DESC \
    ON CONFLICT (timestamp_utc, site_id) DO UPDATE SET metrics = excluded.metrics WHERE excluded.metrics > s.metrics";

/// What one session's events in the batch came to, and their times and messages.
#[derive(Debug)]
struct Folded {
    session_id: Box<str>,
    session: Session,
}

/// A web site's load at a time.
#[derive(Debug)]
struct Report {
    site_id: Box<str>,
    at: Timestamp,
    metrics: Box<str>,
    delivery: usize,
}

/// One event, as far as it is needed after it was folded.
#[derive(Debug)]
struct Event {
    /// Place of its session among the folded ones.
    session: usize,
    at_us: i64,
    delivery: usize,
}

/// Session events, site reports and refused messages that are committed together.
#[derive(Debug)]
pub struct Batch {
    rules: Rules,
    deliveries: Deliveries,
    places: HashMap<Box<str>, usize>,
    sessions: Vec<Folded>,
    events: Vec<Event>,
    reports: Vec<Report>,
}

impl batch::Batch for Batch {
    type Memory = ();

    fn new(source: &'static str, rules: Rules) -> Self {
        Self {
            rules,
            deliveries: Deliveries::new(source),
            places: HashMap::new(),
            sessions: Vec::new(),
            events: Vec::new(),
            reports: Vec::new(),
        }
    }

    fn clear(&mut self) {
        self.deliveries.clear();
        self.places.clear();
        self.sessions.clear();
        self.events.clear();
        self.reports.clear();
    }

    fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    fn push(&mut self, delivery: Delivery, now_us: i64, (): &mut ()) {
        let rules = self.rules;
        decode::visit(&delivery.payload, &rules, &mut Filling { batch: self, delivery: &delivery, now_us });
        self.deliveries.push(delivery);
    }

    fn deliveries(&self) -> &Deliveries {
        &self.deliveries
    }

    fn deliveries_mut(&mut self) -> &mut Deliveries {
        &mut self.deliveries
    }

    fn parts(&self) -> usize {
        self.events.len() + self.reports.len() + self.deliveries.letters().len()
    }

    fn bytes(&self) -> usize {
        self.deliveries.room().1
    }

    fn timestamps(&self) -> impl Iterator<Item = i64> + '_ {
        self.events.iter().map(|event| event.at_us)
    }

    /// Sessions in the order of their ids: the order in which the table's rows are locked.
    fn seal(&mut self) {
        let mut order: Vec<usize> = (0..self.sessions.len()).collect();
        order.sort_unstable_by(|a, b| {
            let id = |place: &usize| self.sessions.get(*place).map(|folded| &folded.session_id);
            id(a).cmp(&id(b))
        });
        let mut moved = vec![0; order.len()];
        for (new, old) in order.iter().enumerate() {
            if let Some(place) = moved.get_mut(*old) {
                *place = new;
            }
        }
        self.events.iter_mut().for_each(|event| {
            event.session = moved.get(event.session).copied().unwrap_or(event.session);
        });
        self.sessions.sort_unstable_by(|a, b| a.session_id.cmp(&b.session_id));
    }

    async fn commit(
        &mut self,
        client: &mut Client,
        path: Path,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        if self.parts() == 0 {
            return Ok(Committed::default());
        }
        let outcome = match path {
            Path::Fast | Path::Merge => in_time(patience, self.commit_fast(client)).await,
            Path::Isolate => self.commit_carefully(client, patience).await,
        };
        if matches!(outcome, Err(WriteError::Duplicate | WriteError::Data { .. })) {
            in_time(patience, async { Ok(client.batch_execute("ROLLBACK").await?) }).await?;
        }
        outcome
    }
}

/// Which table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Sessions,
    Reports,
}

impl Rows for Batch {
    type Part = Part;

    async fn store(&self, client: &Client, range: Range<Part>) -> Result<usize, WriteError> {
        match range.part {
            Part::Sessions => self.merge(client, range.from, range.to).await,
            Part::Reports => self.insert_reports(client, range.from, range.to).await,
        }
    }

    fn merging(_: Part) -> Option<Part> {
        None
    }
}

impl Batch {
    async fn commit_fast(&self, client: &Client) -> Result<Committed, WriteError> {
        let started = Instant::now();
        client.batch_execute(BEGIN).await?;
        let sessions = self.merge(client, 0, self.sessions.len()).await?;
        let reports = self.insert_reports(client, 0, self.reports.len()).await?;
        self.finish(client, sessions + reports, &[], started).await
    }

    async fn commit_carefully(
        &mut self,
        client: &Client,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        let started = Instant::now();
        in_time(patience, async { Ok(client.batch_execute(BEGIN).await?) }).await?;
        let open = vec![
            Range { part: Part::Reports, from: 0, to: self.reports.len() },
            Range { part: Part::Sessions, from: 0, to: self.sessions.len() },
        ];
        let Isolated { stored, refused } = isolate(self, client, patience, open, Vec::new()).await?;
        let letters: Vec<(usize, DeadLetter)> =
            refused.into_iter().flat_map(|(part, row, error)| self.letters(part, row, &error)).collect();
        let (deliveries, letters): (Vec<usize>, Vec<DeadLetter>) = letters.into_iter().unzip();
        let done = in_time(patience, self.finish(client, stored, &letters, started)).await?;
        self.deliveries.refused_by_database(deliveries);
        Ok(done)
    }

    /// The dead letters of a refused row: every message that took part in it, as a whole.
    fn letters(&self, part: Part, row: usize, error: &str) -> Vec<(usize, DeadLetter)> {
        let deliveries: Vec<usize> = match part {
            Part::Sessions => {
                let events = self.events.iter().filter(|event| event.session == row);
                events.map(|event| event.delivery).collect()
            }
            Part::Reports => self.reports.get(row).map(|report| report.delivery).into_iter().collect(),
        };
        let letter = |number: usize| {
            let payload = self.deliveries.get(number)?.payload.clone();
            Some((number, self.deliveries.letter(number, &payload, error.to_owned())?))
        };
        deliveries.into_iter().filter_map(letter).collect()
    }

    /// After the rows: the dead letters, those of `refused` rows too, then COMMIT.
    async fn finish(
        &self,
        client: &Client,
        rows: usize,
        refused: &[DeadLetter],
        started: Instant,
    ) -> Result<Committed, WriteError> {
        let good = self.events.len() + self.reports.len();
        self.deliveries.finish(client, good, rows, refused, started).await
    }

    /// Merges sessions `from..to`; returns how many rows changed.
    async fn merge(&self, client: &Client, from: usize, to: usize) -> Result<usize, WriteError> {
        if from == to {
            return Ok(0);
        }
        let (copy, merge) = tokio::try_join!(client.prepare_cached(COPY), client.prepare_cached(&MERGE))?;
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
        sink.finish().await?;
        fed?;
        let changed = client.execute(&merge, &[]).await?;
        // A second range in the same transaction starts from an empty table.
        if (from, to) != (0, self.sessions.len()) {
            client.batch_execute("TRUNCATE session_staging").await?;
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
    async fn insert_reports(&self, client: &Client, from: usize, to: usize) -> Result<usize, WriteError> {
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

/// Fills a batch from one delivery.
struct Filling<'b> {
    batch: &'b mut Batch,
    delivery: &'b Delivery,
    now_us: i64,
}

impl<'a> decode::Visitor<'a> for Filling<'_> {
    fn session(&mut self, session_id: Cow<'a, str>, session: Session) {
        let Batch { places, sessions, events, deliveries, .. } = &mut *self.batch;
        let at_us = session.newest.at_us;
        let place = match places.get(session_id.as_ref()) {
            Some(place) => {
                if let Some(folded) = sessions.get_mut(*place) {
                    folded.session.merge(session);
                }
                *place
            }
            None => {
                let session_id: Box<str> = session_id.into();
                places.insert(session_id.clone(), sessions.len());
                sessions.push(Folded { session_id, session });
                sessions.len() - 1
            }
        };
        events.push(Event { session: place, at_us, delivery: deliveries.next() });
    }

    fn site(&mut self, site_id: Cow<'a, str>, timestamp_us: i64, metrics: &'a str) {
        let delivery = self.batch.deliveries.next();
        match Timestamp::from_microsecond(timestamp_us) {
            Ok(at) => {
                let report = Report { site_id: site_id.into(), at, metrics: metrics.into(), delivery };
                self.batch.reports.push(report);
            }
            // The decoder takes years 0 to 9999 only, which all are in range.
            Err(error) => tracing::error!(%error, timestamp_us, "a time out of range was accepted"),
        }
    }

    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        let refusal = (rejection.reason, rejection.error);
        self.batch.deliveries.refuse(self.delivery, part, refusal, self.now_us);
    }
}
