//! A batch of session events: folded to one row per session while it is filled, merged into the table in one statement.
//!
//! Site reports in it go to `site_activity`; of two reports of one site and time the greater is kept, whichever came first.

mod tables;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use deadpool_postgres::Client;
use jiff::Timestamp;
use tokio::time::Instant;

use super::{Session, decode, probe};
use crate::audit::key::{Chosen, Key, choose};
use crate::batch::committed::{Committed, in_time};
use crate::batch::{self, Path};
use crate::deliveries::{Deliveries, Outcome, RefusedPart, RefusedParts};
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::isolation::{Blame, Range, RefusedRow, Rows, Stored, isolate};
use crate::letter_limit::LetterLimit;
use crate::reading::{Rejection, Rules, unpack};
use crate::settings::IngestSettings;
use crate::staging;
use crate::tolerated::{Tally, Tolerances};
use crate::transaction;
use tables::{STAGING, begin};

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
    tolerated: Tally,
    /// Sessions that the database has refused.
    refused_sessions: HashSet<usize>,
}

impl batch::Batch for Batch {
    /// Publishers cannot be told apart, so all of one routing key share an allowance.
    type Memory = LetterLimit;

    fn memory(settings: &IngestSettings) -> LetterLimit {
        // In bytes alone: an event is small, and a new version of one application refuses many.
        LetterLimit::new(u32::MAX, settings.dead_letter_bytes_per_device.as_u64())
    }

    fn new(source: &'static str, rules: Rules) -> Self {
        Self {
            deliveries: Deliveries::new(source, rules.max_payload_bytes),
            rules,
            places: HashMap::new(),
            sessions: Vec::new(),
            events: Vec::new(),
            reports: Vec::new(),
            tolerated: Tally::default(),
            refused_sessions: HashSet::new(),
        }
    }

    fn clear(&mut self) {
        self.deliveries.clear();
        self.places.clear();
        self.sessions.clear();
        self.events.clear();
        self.reports.clear();
        self.tolerated = Tally::default();
        self.refused_sessions.clear();
    }

    fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    fn push(&mut self, mut delivery: Delivery, now_us: i64, letters: &mut LetterLimit) {
        self.deliveries.limit_letters(letters);
        self.deliveries.set_time(now_us);
        let rules = self.rules.clone();
        match unpack(&mut delivery.payload, &rules) {
            Ok(of_message) => {
                let mut filling = Filling { batch: self, delivery: &delivery, now_us, of_message };
                decode::visit(&delivery.payload, &rules, &mut filling);
            }
            Err(Rejection { reason, error }) => {
                self.deliveries.refuse(&delivery, &delivery.payload, (reason, error), now_us);
            }
        }
        self.deliveries.push(delivery);
    }

    fn tolerated(&self) -> Tally {
        self.tolerated
    }

    fn deliveries(&self) -> &Deliveries {
        &self.deliveries
    }

    fn deliveries_mut(&mut self) -> &mut Deliveries {
        &mut self.deliveries
    }

    fn parts(&self) -> usize {
        self.good() + self.deliveries.refused()
    }

    fn bytes(&self) -> usize {
        self.deliveries.room().1 + self.deliveries.unpacked()
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
        let outcome = self.try_commit(client, path, patience).await;
        if outcome.as_ref().is_err_and(WriteError::keeps_connection) {
            in_time(patience, transaction::roll_back(client)).await?;
        }
        outcome
    }

    fn refuse_whole(&mut self, error: String) {
        let parts = self.parts();
        self.places.clear();
        self.sessions.clear();
        self.events.clear();
        self.reports.clear();
        self.deliveries.refuse_whole(parts, &error);
    }

    async fn probe(&self, client: &Client, patience: Duration) -> Result<(), WriteError> {
        let offer = async {
            staging::make(client, &STAGING).await?;
            probe::offer(client).await
        };
        crate::probe::alone(client, patience, offer).await
    }

    fn sample(&self, random: u64) -> Chosen {
        choose(self.sessions.len(), random, |row| {
            let Folded { session_id, session } =
                self.sessions.get(row).filter(|_| !self.refused_sessions.contains(&row))?;
            Some(Key { id: session_id.clone(), at_us: session.newest.at_us })
        })
    }

    /// A session's row never goes back to before an event that was committed.
    async fn missing(client: &tokio_postgres::Client, keys: &[Key]) -> Result<Vec<usize>, WriteError> {
        const SQL: &str = "SELECT key.number - 1 FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS key (id, us, number) \
            LEFT JOIN public.user_sessions s ON s.session_id = key.id COLLATE \"C\" \
              AND s.last_activity >= 'epoch'::timestamptz + key.us * interval '1 microsecond' \
            WHERE s.session_id IS NULL ORDER BY 1";
        let ids: Vec<&str> = keys.iter().map(|key| key.id.as_ref()).collect();
        let times: Vec<i64> = keys.iter().map(|key| key.at_us).collect();
        let rows = client.query(SQL, &[&ids, &times]).await?;
        Ok(rows.iter().filter_map(|row| usize::try_from(row.get::<_, i64>(0)).ok()).collect())
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

    async fn store(&self, client: &Client, range: Range<Part>) -> Result<Stored<Part>, WriteError> {
        let stored = match range.part {
            Part::Sessions => self.merge(client, range.from, range.to).await?,
            Part::Reports => self.insert_reports(client, range.from, range.to).await?,
        };
        Ok(Stored { rows: stored, ..Stored::default() })
    }

    fn merging(_: Part) -> Option<Part> {
        None
    }
}

impl Batch {
    /// Events and reports that are not refused yet.
    fn good(&self) -> usize {
        self.events.len() + self.reports.len()
    }

    async fn try_commit(
        &mut self,
        client: &Client,
        path: Path,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        self.deliveries.commit_surplus(client, patience).await?;
        if self.good() == 0 && !self.deliveries.has_open_letters() {
            return Ok(Committed::default());
        }
        match path {
            Path::Fast => {
                let started = Instant::now();
                let stored = in_time(patience, self.store_all(client, patience)).await?;
                self.finish(client, stored, started, patience).await
            }
            _ => self.commit_carefully(client, patience).await,
        }
    }

    async fn store_all(&self, client: &Client, patience: Duration) -> Result<Stored<Part>, WriteError> {
        staging::make(client, &begin(patience)).await?;
        let sessions = self.merge(client, 0, self.sessions.len()).await?;
        let reports = self.insert_reports(client, 0, self.reports.len()).await?;
        Ok(Stored { rows: sessions + reports, ..Stored::default() })
    }

    async fn commit_carefully(
        &mut self,
        client: &Client,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        let started = Instant::now();
        in_time(patience, staging::make(client, &begin(patience))).await?;
        let open = vec![
            Range { part: Part::Reports, from: 0, to: self.reports.len() },
            Range { part: Part::Sessions, from: 0, to: self.sessions.len() },
        ];
        let stored = isolate(self, client, patience, Blame::Nobody, open, Vec::new()).await?;
        if !stored.refused.is_empty() && stored.refused.len() == self.sessions.len() + self.reports.len() {
            // Not one row was taken. Are these rows bad, or do the tables take none any more?
            in_time(patience, crate::probe::in_transaction(client, probe::offer(client))).await?;
        }
        self.finish(client, stored, started, patience).await
    }

    /// The dead letters of refused rows: every message that took part in one, as a whole.
    fn letters_of(&mut self, refused: &[RefusedRow<Part>]) -> RefusedParts {
        let of = |part: Part| refused.iter().filter(move |row| row.part == part).map(|row| (row.row, row));
        let (sessions, reports): (HashMap<_, _>, HashMap<_, _>) =
            (of(Part::Sessions).collect(), of(Part::Reports).collect());
        let events = self.events.iter().map(|event| (event.delivery, sessions.get(&event.session)));
        let reports =
            self.reports.iter().enumerate().map(|(row, report)| (report.delivery, reports.get(&row)));
        let parts = events.chain(reports).filter_map(|(message, refused)| {
            let RefusedRow { reason, error, .. } = refused?;
            Some(RefusedPart { message, element: 0, reason: *reason, error })
        });
        self.deliveries.letters_of_messages(parts.collect())
    }

    /// After the rows: the dead letters, those of refused rows too, then the commit.
    async fn finish(
        &mut self,
        client: &Client,
        stored: Stored<Part>,
        started: Instant,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        let outcome = Outcome { rows: stored.rows, joined: 0, good: self.good() };
        let refused = self.letters_of(&stored.refused);
        let done = self.deliveries.finish(client, outcome, &refused, started, patience).await?;
        self.deliveries.refused_at_database(refused);
        let sessions = stored.refused.iter().filter(|refused| refused.part == Part::Sessions);
        self.refused_sessions = sessions.map(|refused| refused.row).collect();
        Ok(done)
    }
}

/// Fills a batch from one delivery.
struct Filling<'b> {
    batch: &'b mut Batch,
    delivery: &'b Delivery,
    now_us: i64,
    of_message: Tolerances,
}

impl<'a> decode::Visitor<'a> for Filling<'_> {
    fn session(&mut self, session_id: Cow<'_, str>, session: Session) {
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

    fn site(&mut self, site_id: Cow<'_, str>, timestamp_us: i64, metrics: &str) {
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

    fn tolerated(&mut self, tolerances: Tolerances) {
        self.batch.tolerated.add(tolerances.with(self.of_message));
    }
}
