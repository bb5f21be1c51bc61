//! A batch of readings: encoded as messages are taken from the queue, and its way into the table.
//!
//! Fast path: one plain COPY, and a small merge for readings that were seen lately. When the fast path fails because a row
//! is stored already or refused by the database, `careful` finds the rows at fault and stores the rest.

mod careful;
mod encoded;

use std::time::Duration;

use bytes::Bytes;
use deadpool_postgres::Client;
use futures_util::SinkExt;
use tokio::time::Instant;

use crate::copy;
use crate::dead_letter::{self, DeadLetter, Reason};
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::reading::{self, Reading, Rejection, Rules, Visitor};
use crate::recent::Recent;
use crate::settlement::Settled;
use encoded::Encoded;

/// The columns a reading fills, in the order they are encoded.
const COLUMNS: &str =
    "device_id, device_type, site_id, timestamp_utc, firmware, metrics, status, location, tags";

/// Readings and refused messages that are committed together.
#[derive(Debug)]
pub struct Batch {
    source: &'static str,
    rules: Rules,
    deliveries: Vec<Delivery>,
    delivered_bytes: usize,
    /// Readings not seen lately: plain COPY.
    fresh: Encoded,
    /// Readings seen lately, probably stored already: merged.
    suspects: Encoded,
    letters: Vec<DeadLetter>,
    /// Refused parts by the number of their delivery.
    rejected: Vec<(usize, Reason)>,
    /// The row of `fresh` that made the fast path fail, and the database's words, when it named one.
    named: Option<(usize, String)>,
}

/// What a commit did. `copied` until the server had all rows, `committed` from there to the answer to COMMIT.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Committed {
    pub rows: usize,
    pub duplicates: usize,
    pub copied: Duration,
    pub committed: Duration,
}

/// Which way a batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Plain COPY.
    Fast,
    /// Some row is refused: find it, COPY the rest.
    Isolate,
    /// Some row is stored already: everything through a temporary table, duplicates left out.
    Merge,
}

impl Batch {
    /// An empty batch. `source` goes into dead letters.
    #[must_use]
    pub fn new(source: &'static str, rules: Rules) -> Self {
        Self {
            source,
            rules,
            deliveries: Vec::new(),
            delivered_bytes: 0,
            fresh: Encoded::new(),
            suspects: Encoded::new(),
            letters: Vec::new(),
            rejected: Vec::new(),
            named: None,
        }
    }

    /// Empties the batch; its memory is kept for the next one.
    pub fn clear(&mut self) {
        self.deliveries.clear();
        self.delivered_bytes = 0;
        self.fresh.clear();
        self.suspects.clear();
        self.letters.clear();
        self.rejected.clear();
        self.named = None;
    }

    /// The window of accepted times moves with the clock.
    pub fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Decodes and encodes one message.
    pub fn push(&mut self, delivery: Delivery, now_us: i64, recent: &mut Recent) {
        self.delivered_bytes += delivery.size();
        let mut filling = Filling {
            delivery: &delivery,
            number: self.deliveries.len(),
            start: (self.fresh.mark(), self.suspects.mark(), self.letters.len(), self.rejected.len()),
            now_us,
            source: self.source,
            recent,
            fresh: &mut self.fresh,
            suspects: &mut self.suspects,
            letters: &mut self.letters,
            rejected: &mut self.rejected,
        };
        reading::visit(&delivery.topic, &delivery.payload, &self.rules, &mut filling);
        self.deliveries.push(delivery);
    }

    /// Rows and dead letters.
    #[must_use]
    pub fn parts(&self) -> usize {
        self.fresh.len() + self.suspects.len() + self.letters.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.deliveries.is_empty()
    }

    /// Messages in the batch and the room they take in the queue.
    #[must_use]
    pub fn delivered(&self) -> (usize, usize) {
        (self.deliveries.len(), self.delivered_bytes)
    }

    /// Encoded bytes so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.fresh.bytes() + self.suspects.bytes()
    }

    /// Timestamps of the rows, microseconds since 1970.
    pub fn timestamps(&self) -> impl Iterator<Item = i64> + '_ {
        self.fresh.timestamps().chain(self.suspects.timestamps())
    }

    /// Reasons of everything that ended as a dead letter.
    pub fn reasons(&self) -> impl Iterator<Item = Reason> + '_ {
        self.rejected.iter().map(|(_, reason)| *reason)
    }

    /// Closes the batch: nothing may be pushed after this until it is cleared.
    pub fn seal(&mut self) {
        self.fresh.seal();
        self.suspects.seal();
    }

    /// What to tell the source, in receipt order. Takes the deliveries out.
    pub fn settle(&mut self) -> Vec<Settled> {
        let mut rejected = std::mem::take(&mut self.rejected);
        rejected.sort_by_key(|(delivery, _)| *delivery);
        let mut rejected = rejected.into_iter().peekable();
        let mut settled = Vec::with_capacity(self.deliveries.len());
        for (number, delivery) in self.deliveries.drain(..).enumerate() {
            let mut reason = None;
            while let Some((_, next)) = rejected.next_if(|(delivery, _)| *delivery == number) {
                reason.get_or_insert(next);
            }
            if let Some(ack) = delivery.ack {
                settled.push(Settled { ack, rejected: reason });
            }
        }
        settled
    }

    /// Commits everything in one transaction. On an error nothing is stored, or, if the connection was lost, the
    /// outcome is unknown; trying again is harmless in both cases.
    ///
    /// # Errors
    /// [`WriteError`] says what to do next. The connection must be thrown away after `Retry` and `Unknown`.
    pub async fn commit(&mut self, client: &mut Client, path: Path) -> Result<Committed, WriteError> {
        if self.parts() == 0 {
            return Ok(Committed::default());
        }
        let outcome = match path {
            Path::Fast => self.commit_fast(client).await,
            Path::Isolate | Path::Merge => self.commit_carefully(client, path).await,
        };
        if matches!(
            outcome,
            Err(WriteError::Duplicate | WriteError::MissingPartition | WriteError::Data { .. })
        ) {
            client.batch_execute("ROLLBACK").await?;
        }
        outcome
    }

    async fn commit_fast(&mut self, client: &Client) -> Result<Committed, WriteError> {
        let started = Instant::now();
        if self.fresh.is_empty() {
            client.batch_execute("BEGIN").await?;
            let rows = self.suspects.merge(client, 0, self.suspects.len()).await?;
            return self.finish(client, rows, &[], started).await;
        }
        let sql = format!("COPY device_telemetry ({COLUMNS}) FROM STDIN BINARY");
        let statement = client.prepare_cached(&sql).await?;
        // Both requests leave together; the server answers them in order.
        let (begun, sink) = tokio::join!(client.batch_execute("BEGIN"), client.copy_in(&statement));
        begun?;
        let sink = sink?;
        futures_util::pin_mut!(sink);
        let fed = async {
            for message in copy::messages(self.fresh.sealed()) {
                sink.feed(message).await?;
            }
            Ok::<(), tokio_postgres::Error>(())
        };
        // A server that refuses a row stops reading; its reason comes with the end of the COPY.
        let fed = fed.await;
        if !self.suspects.is_empty() || !self.letters.is_empty() || fed.is_err() {
            let rows = sink.finish().await;
            let rows = self.note_named(rows)?;
            fed?;
            let merged = self.suspects.merge(client, 0, self.suspects.len()).await?;
            return self.finish(client, rows + merged, &[], started).await;
        }
        // COMMIT leaves with the end of the COPY. If the COPY failed, it is a rollback.
        let copy = async {
            let rows = sink.finish().await;
            (rows, Instant::now())
        };
        let ((rows, copied_at), committed) = tokio::join!(copy, client.batch_execute("COMMIT"));
        let rows = self.note_named(rows)?;
        committed?;
        let copied = copied_at.duration_since(started);
        Ok(Committed { rows, duplicates: 0, copied, committed: copied_at.elapsed() })
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

    /// After the rows: the dead letters, those of `refused` rows too, then COMMIT.
    async fn finish(
        &self,
        client: &Client,
        rows: usize,
        refused: &[DeadLetter],
        started: Instant,
    ) -> Result<Committed, WriteError> {
        dead_letter::insert(client, &self.letters).await?;
        dead_letter::insert(client, refused).await?;
        let copied_at = Instant::now();
        client.batch_execute("COMMIT").await?;
        Ok(Committed {
            rows,
            duplicates: self.fresh.len() + self.suspects.len() - rows - refused.len(),
            copied: copied_at.duration_since(started),
            committed: copied_at.elapsed(),
        })
    }
}

/// Fills a batch from one delivery.
struct Filling<'b> {
    delivery: &'b Delivery,
    number: usize,
    /// Lengths of everything before this delivery.
    start: (encoded::Mark, encoded::Mark, usize, usize),
    now_us: i64,
    source: &'static str,
    recent: &'b mut Recent,
    fresh: &'b mut Encoded,
    suspects: &'b mut Encoded,
    letters: &'b mut Vec<DeadLetter>,
    rejected: &'b mut Vec<(usize, Reason)>,
}

impl<'a> Visitor<'a> for Filling<'_> {
    fn reading(&mut self, reading: &Reading<'a>) {
        let rows = if self.recent.seen(&reading.device_id, reading.timestamp_us) {
            &mut *self.suspects
        } else {
            &mut *self.fresh
        };
        rows.push(reading, self.number);
    }

    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        self.letters.push(DeadLetter {
            received_at_us: self.now_us,
            source: self.source,
            topic: self.delivery.topic.clone(),
            reason: rejection.reason,
            error: rejection.error,
            payload: slice_of(&self.delivery.payload, part),
        });
        self.rejected.push((self.number, rejection.reason));
    }

    fn restart(&mut self) {
        let (fresh, suspects, letters, rejected) = self.start;
        self.fresh.truncate(fresh);
        self.suspects.truncate(suspects);
        self.letters.truncate(letters);
        self.rejected.truncate(rejected);
    }
}

/// A part of a payload as bytes of its own, sharing its memory.
fn slice_of(payload: &Bytes, part: &[u8]) -> Bytes {
    if part.is_empty() { Bytes::new() } else { payload.slice_ref(part) }
}
