//! Dead letters tried again by today's rules: what is good now is stored and its letter deleted, in one transaction.
//!
//! A letter whose readings are stored already loses nothing by it: identity makes a second row a duplicate. What is still
//! refused stays as it is. Whatever ends the process, each letter is either there or its readings are stored.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use deadpool_postgres::Client;
use service::backoff::Backoff;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::batch::committed::in_time;
use crate::batch::{Batch as _, Path};
use crate::clock::Clock;
use crate::database::Database;
use crate::dead_letter::Reason;
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::partitions::{self, Layout};
use crate::reading::{self, Reading, Rejection, Rules, Tolerance, Visitor};
use crate::settings::IngestSettings;
use crate::telemetry::{Batch, Memory};
use crate::transaction;
use crate::writer::rules;

/// Letters in one transaction; each may be as large as `ingest.max_payload`.
const LETTERS_AT_ONCE: i64 = 100;
/// Between two reports of progress.
const REPORT: Duration = Duration::from_secs(2);

/// Which letters.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub reason: Option<Reason>,
    /// Received at this time or later.
    pub since: Option<jiff::Timestamp>,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Letters looked at.
    pub letters: u64,
    /// Letters whose readings are stored now; they are deleted.
    pub replayed: u64,
    /// New rows.
    pub rows: u64,
    /// Readings that were already stored, or are joined into a stored row.
    pub duplicates: u64,
    /// Letters that are still refused, and stay.
    pub refused: u64,
    /// Letters that do not hold their whole message, and stay.
    pub cut: u64,
}

/// Replays letters of device telemetry.
#[derive(Debug)]
pub struct Replay {
    pub database: Database,
    pub settings: IngestSettings,
    pub filter: Filter,
    /// Do everything but the commit.
    pub dry_run: bool,
}

/// A letter's place in the table.
type Place = (jiff::Timestamp, i64);

/// What became of a look for letters.
enum Page {
    /// There are none.
    End,
    /// The last letter's place, and what came of all of them.
    Done(Place, Report),
    /// Something was missing that is there now.
    Again,
    /// There is a partition for each time, and one of them does not take what it should.
    Unplaced,
}

struct Letter {
    place: Place,
    is_cut: bool,
    delivery: Delivery,
}

impl Replay {
    /// Until the last letter, or shutdown. `progress` is told now and then.
    ///
    /// # Errors
    /// When it is shut down before the end. What was replayed until then stays so.
    pub async fn run(
        self,
        shutdown: &CancellationToken,
        mut progress: impl FnMut(&Report),
    ) -> anyhow::Result<Report> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut report = Report::default();
        let mut after: Option<Place> = None;
        let mut path = Path::Merge;
        let mut reported = Instant::now();
        loop {
            let outcome = tokio::select! {
                outcome = self.page(after, path) => outcome,
                () = shutdown.cancelled() => anyhow::bail!("ended before the last letter"),
            };
            match outcome {
                Ok(Page::End) => return Ok(report),
                Ok(Page::Again) => {}
                Ok(Page::Unplaced) => path = Path::IsolateUnplaced,
                Ok(Page::Done(last, page)) => {
                    backoff.reset();
                    path = Path::Merge;
                    after = Some(last);
                    report.add(&page);
                    if reported.elapsed() > REPORT {
                        reported = Instant::now();
                        progress(&report);
                    }
                }
                Err(error) => {
                    let wait = backoff.next(rand::random());
                    tracing::warn!(%error, again_in = ?wait, "letters are not replayed now");
                    tokio::select! {
                        () = sleep(wait) => {}
                        () = shutdown.cancelled() => {}
                    }
                }
            }
        }
    }

    /// The next letters after a place.
    async fn page(&self, after: Option<Place>, path: Path) -> Result<Page, WriteError> {
        let mut client = self.database.client().await?;
        let mut times = Vec::new();
        match self.try_page(&client, after, path, &mut times).await {
            Err(WriteError::MissingPartition) => {
                let made = self.make_partitions(&mut client, &times).await;
                if made.is_err() {
                    self.database.discard(client, "partitions not made");
                }
                made
            }
            Err(error) => {
                self.database.discard(client, &error.to_string());
                Err(error)
            }
            done => done,
        }
    }

    /// For readings of these times, after their transaction has failed for want of them.
    async fn make_partitions(&self, client: &mut Client, times: &[i64]) -> Result<Page, WriteError> {
        in_time(self.patience(), transaction::roll_back(client)).await?;
        let layout = Layout::new(&self.settings);
        let needed = layout.cells(times.iter().copied());
        match in_time(self.patience(), partitions::ensure(client, &layout, &needed)).await? {
            0 => Ok(Page::Unplaced),
            _ => Ok(Page::Again),
        }
    }

    async fn try_page(
        &self,
        client: &Client,
        after: Option<Place>,
        path: Path,
        times: &mut Vec<i64>,
    ) -> Result<Page, WriteError> {
        let patience = self.patience();
        in_time(patience, async { Ok(client.batch_execute(&transaction::begin(patience)).await?) }).await?;
        let letters = in_time(patience, self.letters(client, after)).await?;
        let Some(last) = letters.last().map(|letter| letter.place) else {
            in_time(patience, transaction::roll_back(client)).await?;
            return Ok(Page::End);
        };
        let mut report = Report { letters: letters.len() as u64, ..Report::default() };
        let clock = Clock::new(&self.settings);
        in_time(patience, clock.measure(client)).await?;
        let now_us = clock.now_us();
        let tolerance = Arc::new(Tolerance::new(&self.settings));
        let rules = rules(&self.settings, clock.window(), &tolerance);
        let mut batch = Batch::new("mqtt", rules.clone());
        let mut memory = Memory::new(&self.settings);
        let mut places = Vec::new();
        for Letter { place, is_cut, delivery } in letters {
            if is_cut {
                report.cut += 1;
            } else if is_good(&delivery, &rules) {
                batch.push(delivery, now_us, &mut memory);
                places.push(place);
            } else {
                report.refused += 1;
            }
        }
        batch.seal();
        times.extend(batch.timestamps());
        let stored = batch.store_for_replay(client, path, patience).await?;
        report.rows = stored.rows as u64;
        report.duplicates = stored.duplicates as u64;
        let done: Vec<Place> = places
            .into_iter()
            .enumerate()
            .filter(|(number, _)| !stored.refused.contains(number))
            .map(|(_, place)| place)
            .collect();
        report.refused += stored.refused.len() as u64;
        report.replayed = done.len() as u64;
        in_time(patience, delete(client, &done)).await?;
        if self.dry_run {
            in_time(patience, transaction::roll_back(client)).await?;
        } else {
            in_time(patience, transaction::commit(client)).await?;
        }
        Ok(Page::Done(last, report))
    }

    fn patience(&self) -> Duration {
        self.database.commit_timeout()
    }

    /// Locked, so that two replays at once share the work; a letter that the other one has is left to it.
    async fn letters(&self, client: &Client, after: Option<Place>) -> Result<Vec<Letter>, WriteError> {
        const SQL: &str = "SELECT received_at, id, topic, payload, payload_bytes IS NOT NULL FROM public.dead_letters \
            WHERE source = 'mqtt' AND ($1::text IS NULL OR reason = $1) \
              AND ($2::timestamptz IS NULL OR received_at >= $2) \
              AND ($3::timestamptz IS NULL OR (received_at, id) > ($3, $4::bigint)) \
            ORDER BY received_at, id LIMIT $5 FOR UPDATE SKIP LOCKED";
        let reason = self.filter.reason.map(Reason::as_str);
        let (after_time, after_id) = after.unzip();
        let rows = client
            .query(SQL, &[&reason, &self.filter.since, &after_time, &after_id, &LETTERS_AT_ONCE])
            .await?;
        Ok(rows
            .iter()
            .map(|row| Letter {
                place: (row.get(0), row.get(1)),
                is_cut: row.get(4),
                delivery: Delivery::new(
                    Bytes::from(row.get::<_, String>(2)),
                    Bytes::from(row.get::<_, Vec<u8>>(3)),
                    None,
                    Instant::now(),
                ),
            })
            .collect())
    }
}

impl Report {
    fn add(&mut self, page: &Self) {
        self.letters += page.letters;
        self.replayed += page.replayed;
        self.rows += page.rows;
        self.duplicates += page.duplicates;
        self.refused += page.refused;
        self.cut += page.cut;
    }
}

async fn delete(client: &Client, places: &[Place]) -> Result<(), WriteError> {
    if places.is_empty() {
        return Ok(());
    }
    const SQL: &str = "DELETE FROM public.dead_letters AS d USING unnest($1::timestamptz[], $2::bigint[]) AS done (received_at, id) \
        WHERE d.received_at = done.received_at AND d.id = done.id";
    let (times, ids): (Vec<jiff::Timestamp>, Vec<i64>) = places.iter().copied().unzip();
    let deleted = client.execute(SQL, &[&times, &ids]).await?;
    if usize::try_from(deleted) == Ok(places.len()) {
        Ok(())
    } else {
        Err(WriteError::Schema(format!("{deleted} of {} dead letters could be deleted", places.len())))
    }
}

/// Whether nothing in a message is refused any more.
fn is_good(delivery: &Delivery, rules: &Rules) -> bool {
    struct Refused(bool);
    impl<'a> Visitor<'a> for Refused {
        fn reading(&mut self, _: &Reading<'_>) {}

        fn rejected(&mut self, _: &'a [u8], _: Rejection) {
            self.0 = true;
        }

        fn restart(&mut self) {
            self.0 = false;
        }
    }
    let mut payload = delivery.payload.clone();
    if payload.is_empty() {
        return rules.tolerance.lenient.empty;
    }
    let mut refused = Refused(false);
    if reading::unpack(&mut payload, rules).is_err() {
        return false;
    }
    reading::visit(&delivery.topic, &payload, rules, &mut refused);
    !refused.0
}
