//! A batch of readings: encoded as messages are taken from the queue, and its way into the table.
//!
//! Fast path: one plain COPY, and a small merge for readings that were seen lately. When the fast path fails because a row
//! is stored already or refused by the database, `careful` finds the rows at fault and stores the rest.

mod audit;
mod careful;
mod encoded;
mod merge;
mod probe;

use std::collections::HashSet;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use deadpool_postgres::Client;
use futures_util::SinkExt;
use tokio::time::Instant;
use tokio_postgres::CopyInSink;

use crate::audit::key::{Chosen, Key};
use crate::batch::committed::{Committed, in_time};
use crate::batch::{self, Path};
use crate::copy;
use crate::dead_letter::Reason;
use crate::deliveries::{self, Deliveries, Outcome};
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::isolation::Stored;
use crate::letter_limit::LetterLimit;
use crate::reading::{self, Reading, Rejection, Rules, Visitor};
use crate::recent::Recent;
use crate::schema::{self, Purpose};
use crate::settings::IngestSettings;
use crate::site_counts::SiteCounts;
use crate::tolerated::{Tally, Tolerances, Tolerated};
use crate::transaction;
use careful::Part;
use encoded::Encoded;

/// The columns a reading fills, in the order they are encoded.
const COLUMNS: &str =
    "device_id, device_type, site_id, timestamp_utc, firmware, metrics, status, location, tags";

/// What the decoder remembers from batch to batch.
#[derive(Debug)]
pub struct Memory {
    recent: Recent,
    letters: LetterLimit,
}

impl Memory {
    #[must_use]
    pub fn new(settings: &IngestSettings) -> Self {
        let bytes = settings.dead_letter_bytes_per_device.as_u64();
        let letters = LetterLimit::new(settings.dead_letters_per_device, bytes);
        Self { recent: Recent::default(), letters }
    }
}

/// Readings and refused messages that are committed together.
#[derive(Debug)]
pub struct Batch {
    rules: Rules,
    deliveries: Deliveries,
    /// Readings not seen lately: plain COPY.
    fresh: Encoded,
    /// Readings seen lately, probably stored already: merged.
    suspects: Encoded,
    /// The row of `fresh` that made the fast path fail, and the database's words, when it named one.
    named: Option<(usize, String)>,
    /// See [`Path::MergeByLook`].
    by_look: bool,
    site_counts: SiteCounts,
    tolerated: Tally,
    /// Rows that the database has refused, those of `suspects` after those of `fresh`.
    refused_rows: HashSet<usize>,
}

impl batch::Batch for Batch {
    type Memory = Memory;

    fn memory(settings: &IngestSettings) -> Memory {
        Memory::new(settings)
    }

    fn new(source: &'static str, rules: Rules) -> Self {
        Self {
            deliveries: Deliveries::new(source, rules.max_payload_bytes),
            rules,
            fresh: Encoded::new(),
            suspects: Encoded::new(),
            named: None,
            by_look: false,
            site_counts: SiteCounts::default(),
            tolerated: Tally::default(),
            refused_rows: HashSet::new(),
        }
    }

    fn clear(&mut self) {
        self.deliveries.clear();
        self.fresh.clear();
        self.suspects.clear();
        self.named = None;
        self.site_counts.clear();
        self.tolerated = Tally::default();
        self.refused_rows.clear();
    }

    fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Decodes and encodes one message.
    fn push(&mut self, mut delivery: Delivery, now_us: i64, memory: &mut Memory) {
        self.deliveries.set_time(now_us);
        self.deliveries.limit_letters(&memory.letters);
        if let Some(problem) = delivery.malformed {
            let refusal = (Reason::MalformedPacket, problem.to_owned());
            self.deliveries.refuse(&delivery, &delivery.payload, refusal, now_us);
            return self.deliveries.push(delivery);
        }
        if delivery.payload.is_empty() && self.rules.tolerance.lenient.empty {
            self.tolerated.add(Tolerated::Empty.into());
            return self.deliveries.push(delivery);
        }
        let of_message = match reading::unpack(&mut delivery.payload, &self.rules) {
            Ok(tolerated) => tolerated,
            Err(Rejection { reason, error }) => {
                self.deliveries.refuse(&delivery, &delivery.payload, (reason, error), now_us);
                return self.deliveries.push(delivery);
            }
        };
        let mut filling = Filling {
            delivery: &delivery,
            start: (self.fresh.mark(), self.suspects.mark(), self.deliveries.mark()),
            now_us,
            of_message,
            tolerated: Tally::default(),
            recent: &mut memory.recent,
            fresh: &mut self.fresh,
            suspects: &mut self.suspects,
            deliveries: &mut self.deliveries,
        };
        let before = filling.fresh.len() + filling.suspects.len();
        let topic = reading::visit(&delivery.topic, &delivery.payload, &self.rules, &mut filling);
        self.tolerated.merge(&filling.tolerated);
        if let Some(topic) = topic {
            self.site_counts.add(&topic, self.fresh.len() + self.suspects.len() - before);
        }
        self.deliveries.push(delivery);
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
        self.fresh.bytes()
            + self.suspects.bytes()
            + self.deliveries.letter_bytes()
            + self.deliveries.unpacked()
    }

    fn timestamps(&self) -> impl Iterator<Item = i64> + '_ {
        self.fresh.timestamps().chain(self.suspects.timestamps())
    }

    fn site_counts(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.site_counts.iter()
    }

    fn tolerated(&self) -> Tally {
        self.tolerated
    }

    fn seal(&mut self) {
        self.fresh.seal();
        self.suspects.seal();
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
        self.fresh.clear();
        self.suspects.clear();
        self.site_counts.clear();
        self.deliveries.refuse_whole(parts, &error);
    }

    async fn probe(&self, client: &Client, patience: Duration) -> Result<(), WriteError> {
        let offer = async {
            // First: an offer that finds no partition ends with a transaction that takes nothing more.
            merge::make_staging(client).await?;
            self.offer(client).await
        };
        crate::probe::alone(client, patience, offer).await
    }

    fn sample(&self, random: u64) -> Chosen {
        audit::sample(self, random)
    }

    async fn missing(client: &tokio_postgres::Client, keys: &[Key]) -> Result<Vec<usize>, WriteError> {
        audit::missing(client, keys).await
    }
}

impl Batch {
    /// Offers the table what it took before.
    async fn offer(&self, client: &Client) -> Result<(), WriteError> {
        schema::are_ours(client, Purpose::Telemetry).await?;
        let times = self.fresh.timestamps().chain(self.suspects.timestamps());
        probe::offer(client, &probe::places(times)).await
    }

    /// Readings that are not refused yet.
    fn good(&self) -> usize {
        self.fresh.len() + self.suspects.len()
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
        if path == Path::Fast {
            self.named = None;
        }
        self.by_look = path == Path::MergeByLook;
        match path {
            Path::Fast if self.suspects.is_empty() && !self.deliveries.has_open_letters() => {
                in_time(patience, self.commit_at_once(client, patience)).await
            }
            Path::Fast => self.commit_fast(client, patience).await,
            // Many steps when many rows are refused: a deadline over all of them would begin again for ever.
            _ => self.commit_carefully(client, path, patience).await,
        }
    }

    /// Nothing but new readings: COMMIT leaves with the end of the COPY. If the COPY failed, it is refused.
    async fn commit_at_once(&mut self, client: &Client, patience: Duration) -> Result<Committed, WriteError> {
        let started = Instant::now();
        let (begun, sink) = self.begin_copy(client, patience).await?;
        futures_util::pin_mut!(sink);
        begun?;
        let fed = self.feed(sink.as_mut()).await;
        let copy = async {
            let rows = transaction::finish_copy(sink).await;
            (rows, Instant::now())
        };
        if fed.is_err() {
            let (rows, _) = copy.await;
            self.note_named(rows)?;
            return Err(
                fed.map_or_else(WriteError::from, |()| WriteError::Retry("the COPY was not taken".into()))
            );
        }
        let ((rows, copied_at), committed) = tokio::join!(copy, transaction::commit(client));
        let rows = self.note_named(rows)?;
        committed?;
        self.all_kept(rows)?;
        let copied = copied_at.duration_since(started);
        Ok(Committed { rows, copied, committed: copied_at.elapsed(), ..Committed::default() })
    }

    /// New readings by COPY, then those seen lately, then the letters.
    async fn commit_fast(&mut self, client: &Client, patience: Duration) -> Result<Committed, WriteError> {
        let started = Instant::now();
        let mut stored = Stored::default();
        if self.fresh.is_empty() {
            in_time(patience, async { Ok(client.batch_execute(&transaction::begin(patience)).await?) })
                .await?;
        } else {
            stored.rows = in_time(patience, self.copy_fresh(client, patience)).await?;
        }
        let merged =
            self.suspects.merge(client, (0, self.suspects.len()), self.rules.same_identity, self.by_look);
        stored.add(in_time(patience, async { Ok(Part::Suspects.stored(merged.await?)) }).await?);
        self.finish(client, stored, started, patience).await
    }

    async fn copy_fresh(&mut self, client: &Client, patience: Duration) -> Result<usize, WriteError> {
        let (begun, sink) = self.begin_copy(client, patience).await?;
        futures_util::pin_mut!(sink);
        begun?;
        let fed = self.feed(sink.as_mut()).await;
        // A server that refuses a row stops reading; its reason comes with the end of the COPY.
        let rows = transaction::finish_copy(sink).await;
        let rows = self.note_named(rows)?;
        fed?;
        self.all_kept(rows)?;
        Ok(rows)
    }

    /// BEGIN and COPY leave together; the server answers them in order.
    async fn begin_copy(
        &self,
        client: &Client,
        patience: Duration,
    ) -> Result<(Result<(), tokio_postgres::Error>, CopyInSink<Bytes>), WriteError> {
        let sql = format!("COPY public.device_telemetry ({COLUMNS}) FROM STDIN BINARY");
        let statement = client.prepare_cached(&sql).await?;
        let begin = transaction::begin(patience);
        let (begun, sink) = tokio::join!(client.batch_execute(&begin), client.copy_in(&statement));
        Ok((begun, sink?))
    }

    async fn feed(&self, mut sink: Pin<&mut CopyInSink<Bytes>>) -> Result<(), tokio_postgres::Error> {
        for message in copy::messages(self.fresh.sealed()) {
            sink.feed(message).await?;
        }
        Ok(())
    }

    /// # Errors
    /// When the table kept fewer rows than it was sent.
    fn all_kept(&self, kept: usize) -> Result<(), WriteError> {
        let sent = self.fresh.len();
        if kept == sent { Ok(()) } else { Err(WriteError::Swallowed { sent, kept }) }
    }

    /// Remembers which row the database refused.
    fn note_named(&mut self, rows: Result<u64, tokio_postgres::Error>) -> Result<usize, WriteError> {
        let error = match rows {
            Ok(rows) => return Ok(usize::try_from(rows).unwrap_or(usize::MAX)),
            Err(error) => WriteError::from(error),
        };
        if let WriteError::Data { message, line: Some(line) } = &error {
            self.named = Some((*line, message.clone()));
        }
        Err(error)
    }

    /// After the rows: the dead letters, those of refused rows too, then the commit.
    async fn finish(
        &mut self,
        client: &Client,
        stored: Stored<Part>,
        started: Instant,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        let outcome = Outcome { rows: stored.rows, joined: stored.joined, good: self.good() };
        let refused = self.letters_of(&stored.refused);
        let done = self.deliveries.finish(client, outcome, &refused, started, patience).await?;
        self.deliveries.refused_at_database(refused);
        self.refused_rows = stored.refused.iter().map(|row| self.place(row)).collect();
        Ok(done)
    }
}

/// Fills a batch from one delivery.
struct Filling<'b> {
    delivery: &'b Delivery,
    /// Lengths of everything before this delivery.
    start: (encoded::Mark, encoded::Mark, deliveries::Mark),
    now_us: i64,
    /// What was tolerated in the message as a whole, and in its readings so far.
    of_message: Tolerances,
    tolerated: Tally,
    recent: &'b mut Recent,
    fresh: &'b mut Encoded,
    suspects: &'b mut Encoded,
    deliveries: &'b mut Deliveries,
}

impl<'a> Visitor<'a> for Filling<'_> {
    fn reading(&mut self, reading: &Reading<'_>) {
        self.tolerated.add(reading.tolerated.with(self.of_message));
        let rows = if self.recent.seen(&reading.device_id, reading.timestamp_us) {
            &mut *self.suspects
        } else {
            &mut *self.fresh
        };
        rows.push(reading, self.deliveries.next());
    }

    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        self.deliveries.refuse(self.delivery, part, (rejection.reason, rejection.error), self.now_us);
    }

    fn restart(&mut self) {
        let (fresh, suspects, deliveries) = self.start;
        self.fresh.truncate(fresh);
        self.suspects.truncate(suspects);
        self.deliveries.truncate(deliveries);
        self.tolerated = Tally::default();
    }
}
