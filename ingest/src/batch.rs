//! What a writer needs of a batch, and what all batches have in common.
//!
//! A [`Batch`] is filled from messages, committed as a whole and settled. The writer, its retries, metrics and shutdown
//! are the same for every kind; what a message holds and which table it ends in is the kind's own business.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use deadpool_postgres::Client;
use tokio::time::{Instant, timeout};

use crate::dead_letter::{self, DeadLetter, Reason};
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::reading::Rules;
use crate::settlement::{Refused, Settled};

/// What a commit did. `copied` until the server had all rows, `committed` from there to the answer to COMMIT.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Committed {
    pub rows: usize,
    /// Stored already, or outdone by something newer.
    pub duplicates: usize,
    pub copied: Duration,
    pub committed: Duration,
}

/// Which way a batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// What a good batch takes.
    Fast,
    /// Some row is refused: find it, store the rest.
    Isolate,
    /// Some row is stored already: everything through a temporary table, duplicates left out.
    Merge,
}

impl Path {
    /// As traces name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Isolate => "isolate",
            Self::Merge => "merge",
        }
    }
}

/// Rows and refused messages that are committed together.
pub trait Batch: Send + Sync + 'static {
    /// What the decoder remembers from batch to batch; one for all writers of a queue.
    type Memory: Default + Send;

    /// An empty batch. `source` goes into dead letters.
    fn new(source: &'static str, rules: Rules) -> Self;

    /// The window of accepted times moves with the clock.
    fn set_rules(&mut self, rules: Rules);

    /// Decodes one message.
    fn push(&mut self, delivery: Delivery, now_us: i64, memory: &mut Self::Memory);

    fn deliveries(&self) -> &Deliveries;

    fn deliveries_mut(&mut self) -> &mut Deliveries;

    /// Rows and dead letters, whatever becomes of them.
    fn parts(&self) -> usize;

    /// Bytes to send so far.
    fn bytes(&self) -> usize;

    /// Times of what is in the batch, microseconds since 1970: for the end-to-end latency.
    fn timestamps(&self) -> impl Iterator<Item = i64> + '_;

    /// Readings by site and device type, for kinds that have such.
    fn census(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        std::iter::empty()
    }

    /// Closes the batch: nothing may be pushed after this until it is cleared.
    fn seal(&mut self);

    /// Commits everything in one transaction; no step may take longer than `patience`. On an error nothing is stored, or, if the connection was lost, the
    /// outcome is unknown; trying again is harmless in both cases.
    ///
    /// # Errors
    /// [`WriteError`] says what to do next. The connection must be thrown away after `Retry` and `Unknown`.
    fn commit(
        &mut self,
        client: &mut Client,
        path: Path,
        patience: Duration,
    ) -> impl Future<Output = Result<Committed, WriteError>> + Send;

    /// Empties the batch; its memory is kept for the next one.
    fn clear(&mut self);
}

/// The messages of a batch and what was refused of them.
#[derive(Debug)]
pub struct Deliveries {
    source: &'static str,
    messages: Vec<Delivery>,
    bytes: usize,
    /// Refused while decoding; committed with the rows.
    letters: Vec<DeadLetter>,
    /// Refused parts by the number of their message.
    rejected: Vec<(usize, Reason)>,
}

/// A place to go back to.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    letters: usize,
    rejected: usize,
}

impl Deliveries {
    /// Ends a batch's transaction, after its rows: the dead letters, those of `refused` rows too, then COMMIT. Of `good`
    /// parts, what is neither a row nor refused was a duplicate.
    pub(crate) async fn finish(
        &self,
        client: &Client,
        good: usize,
        rows: usize,
        refused: &[DeadLetter],
        started: Instant,
    ) -> Result<Committed, WriteError> {
        dead_letter::insert(client, &self.letters).await?;
        dead_letter::insert(client, refused).await?;
        leave_a_record(client, rows).await?;
        let copied_at = Instant::now();
        client.batch_execute("COMMIT").await?;
        Ok(Committed {
            rows,
            duplicates: good - rows - refused.len(),
            copied: copied_at.duration_since(started),
            committed: copied_at.elapsed(),
        })
    }

    /// None yet. `source` goes into dead letters.
    #[must_use]
    pub fn new(source: &'static str) -> Self {
        Self { source, messages: Vec::new(), bytes: 0, letters: Vec::new(), rejected: Vec::new() }
    }

    pub fn clear(&mut self) {
        self.messages.clear();
        self.bytes = 0;
        self.letters.clear();
        self.rejected.clear();
    }

    /// The number the next message will have.
    #[must_use]
    pub fn next(&self) -> usize {
        self.messages.len()
    }

    /// Takes a decoded message in.
    pub fn push(&mut self, delivery: Delivery) {
        self.bytes += delivery.size();
        self.messages.push(delivery);
    }

    #[must_use]
    pub fn get(&self, number: usize) -> Option<&Delivery> {
        self.messages.get(number)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Messages and the room they take in the queue.
    #[must_use]
    pub fn room(&self) -> (usize, usize) {
        (self.messages.len(), self.bytes)
    }

    #[must_use]
    pub fn letters(&self) -> &[DeadLetter] {
        &self.letters
    }

    /// Payload bytes of the dead letters.
    #[must_use]
    pub fn letter_bytes(&self) -> usize {
        self.letters.iter().map(|letter| letter.payload.len()).sum()
    }

    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark { letters: self.letters.len(), rejected: self.rejected.len() }
    }

    /// Forgets what was refused since.
    pub fn truncate(&mut self, mark: Mark) {
        self.letters.truncate(mark.letters);
        self.rejected.truncate(mark.rejected);
    }

    /// A message about to be pushed, or a part of it, is refused.
    pub fn refuse(
        &mut self,
        delivery: &Delivery,
        part: &[u8],
        (reason, error): (Reason, String),
        now_us: i64,
    ) {
        self.rejected.push((self.next(), reason));
        self.letters.push(DeadLetter {
            received_at_us: now_us,
            source: self.source,
            topic: delivery.topic.clone(),
            reason,
            error,
            payload: slice_of(&delivery.payload, part),
        });
    }

    /// The dead letter of a part of message `number` that the database refused. It counts when it is committed:
    /// [`Deliveries::refused_by_database`].
    #[must_use]
    pub fn letter(&self, number: usize, part: &[u8], error: String) -> Option<DeadLetter> {
        let delivery = self.messages.get(number)?;
        Some(DeadLetter {
            received_at_us: wall_clock_of(delivery.received),
            source: self.source,
            topic: delivery.topic.clone(),
            reason: Reason::RejectedByDatabase,
            error,
            payload: slice_of(&delivery.payload, part),
        })
    }

    /// The letters of parts of these messages are committed.
    pub fn refused_by_database(&mut self, numbers: impl IntoIterator<Item = usize>) {
        self.rejected.extend(numbers.into_iter().map(|number| (number, Reason::RejectedByDatabase)));
    }

    /// Reasons of everything that ended as a dead letter.
    pub fn reasons(&self) -> impl Iterator<Item = Reason> + '_ {
        self.rejected.iter().map(|(_, reason)| *reason)
    }

    /// What to tell the source, in receipt order. Takes the messages out.
    pub fn settle(&mut self) -> Vec<Settled> {
        let mut rejected = std::mem::take(&mut self.rejected);
        rejected.sort_by_key(|(number, _)| *number);
        let mut rejected = rejected.into_iter().peekable();
        let mut settled = Vec::with_capacity(self.messages.len());
        for (number, delivery) in self.messages.drain(..).enumerate() {
            let mut reason = None;
            while let Some((_, next)) = rejected.next_if(|(of, _)| *of == number) {
                reason.get_or_insert(next);
            }
            if let Some(ack) = delivery.ack {
                let refused = reason.map(|reason| {
                    Box::new(Refused { reason, topic: delivery.topic, payload: delivery.payload })
                });
                settled.push(Settled { ack, rejected: refused });
            }
        }
        settled
    }
}

/// Without an answer in time the connection is to be dropped, not the commit cancelled: a cancelled wait for the standby
/// would be reported as a success.
pub(crate) async fn in_time<T>(
    patience: Duration,
    step: impl Future<Output = Result<T, WriteError>>,
) -> Result<T, WriteError> {
    match timeout(patience, step).await {
        Ok(outcome) => outcome,
        Err(_) => Err(WriteError::Retry(format!("no answer from Postgres within {patience:?}"))),
    }
}

/// A transaction that writes nothing does not wait for the standby; yet its duplicates may be rows of an earlier try that
/// only this machine has. With a record of its own it waits for those too.
async fn leave_a_record(client: &Client, rows: usize) -> Result<(), WriteError> {
    if rows == 0 {
        client.batch_execute("SELECT pg_logical_emit_message(true, 'tier0', 'nothing new')").await?;
    }
    Ok(())
}

/// A part of a payload as bytes of its own, sharing its memory.
fn slice_of(payload: &Bytes, part: &[u8]) -> Bytes {
    if part.is_empty() { Bytes::new() } else { payload.slice_ref(part) }
}

/// The wall clock at a past moment of the monotonic one, microseconds since 1970.
fn wall_clock_of(moment: Instant) -> i64 {
    let ago = i64::try_from(moment.elapsed().as_micros()).unwrap_or(0);
    jiff::Timestamp::now().as_microsecond() - ago
}
