//! The messages of a batch, and what was refused of them.
//!
//! What is refused may cost no more than it weighed when it came: of one message at most [`LETTERS_PER_MESSAGE`] parts get a
//! dead letter of their own, then one letter holds the message as a whole; a device that sends nothing but refused
//! messages is held to [`LetterLimit`]. What has no letter is counted.

mod refused;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use deadpool_postgres::Client;
use tokio::time::Instant;

use crate::batch::committed::{Committed, in_time};
use crate::dead_letter::{self, DeadLetter, Reason};
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::letter_limit::{Admissions, LetterLimit, Origin};
use crate::settlement::{Refused, Settled};
use crate::transaction;
pub(crate) use refused::{RefusedPart, RefusedParts};

/// Parts of one message that get a letter of their own. A message of two-byte parts would otherwise be stored as ten
/// thousand letters, each a hundred times its size.
pub const LETTERS_PER_MESSAGE: usize = 100;

/// Letters that are committed together with rows weigh at most so much, and others go in transactions of their own of this
/// size: one commit must fit into its deadline whatever strangers send.
const LETTER_BYTES_PER_TRANSACTION: usize = 1 << 20;

/// The messages of a batch and what was refused of them.
#[derive(Debug)]
pub struct Deliveries {
    source: &'static str,
    messages: Vec<Delivery>,
    bytes: usize,
    /// What messages that came compressed hold besides.
    unpacked: usize,
    /// Refused while decoding.
    letters: Vec<DeadLetter>,
    /// So many of `letters` are committed, ahead of the rows.
    committed: usize,
    /// Refused parts by the number of their message.
    rejected: Vec<(usize, Reason)>,
    /// Of the message about to be pushed.
    admissions_of_next: Admissions,
    /// Shared by all batches of a queue; `None`: no limit.
    limit: Option<LetterLimit>,
    /// Of the letters something was not stored: the table is nearly full.
    cut: AtomicBool,
    /// Payloads of letters are cut to this.
    max_payload: usize,
    /// Refused parts that have no letter because their device had too many.
    suppressed: usize,
    /// The time, microseconds since 1970, at a moment of the monotonic clock.
    clock: Option<(Instant, i64)>,
}

/// A place to go back to.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    letters: usize,
    rejected: usize,
    suppressed: usize,
}

/// What becomes of the good parts of a batch, to be committed with its letters.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outcome {
    /// New rows.
    pub(crate) rows: usize,
    /// Joined into rows that were stored already.
    pub(crate) joined: usize,
    /// All good parts: what is neither a row, joined nor refused was a duplicate.
    pub(crate) good: usize,
}

impl Deliveries {
    /// None yet. `source` goes into dead letters, whose payloads are cut to `max_payload` bytes.
    #[must_use]
    pub fn new(source: &'static str, max_payload: usize) -> Self {
        Self {
            source,
            messages: Vec::new(),
            bytes: 0,
            unpacked: 0,
            letters: Vec::new(),
            committed: 0,
            rejected: Vec::new(),
            admissions_of_next: Admissions::default(),
            limit: None,
            cut: AtomicBool::new(false),
            max_payload,
            suppressed: 0,
            clock: None,
        }
    }

    pub fn clear(&mut self) {
        self.messages.clear();
        self.forget();
    }

    /// Forgets what came of the messages.
    fn forget(&mut self) {
        self.bytes = 0;
        self.unpacked = 0;
        self.letters.clear();
        self.committed = 0;
        self.rejected.clear();
        self.admissions_of_next = Admissions::default();
        self.suppressed = 0;
        *self.cut.get_mut() = false;
    }

    /// It is `now_us`; the same value again costs nothing.
    pub fn set_time(&mut self, now_us: i64) {
        if self.clock.is_none_or(|(_, before)| before != now_us) {
            self.clock = Some((Instant::now(), now_us));
        }
    }

    /// The time at another moment of the monotonic clock, by the last [`Deliveries::set_time`].
    fn time_of(&self, moment: Instant) -> i64 {
        let Some((at, now_us)) = self.clock else { return 0 };
        let micros = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(0);
        now_us + micros(moment.saturating_duration_since(at)) - micros(at.saturating_duration_since(moment))
    }

    /// From now on devices are held to this limit.
    pub fn limit_letters(&mut self, limit: &LetterLimit) {
        if self.limit.is_none() {
            self.limit = Some(limit.clone());
        }
    }

    /// Commits letters in transactions of their own until what is left may go with the rows. A letter that is committed stays
    /// committed whatever becomes of the rows; its message is not acknowledged before them.
    pub(crate) async fn commit_surplus(
        &mut self,
        client: &Client,
        patience: Duration,
    ) -> Result<(), WriteError> {
        while self.open_letters().iter().map(DeadLetter::weight).sum::<usize>() > LETTER_BYTES_PER_TRANSACTION
        {
            let piece = dead_letter::piece(self.open_letters(), LETTER_BYTES_PER_TRANSACTION);
            let commit = async {
                client.batch_execute(&transaction::begin(patience)).await?;
                if !dead_letter::insert(client, piece).await? {
                    self.cut.store(true, Ordering::Relaxed);
                }
                transaction::commit(client).await
            };
            in_time(patience, commit).await?;
            self.committed += piece.len();
        }
        Ok(())
    }

    /// Letters that still go with the rows.
    fn open_letters(&self) -> &[DeadLetter] {
        self.letters.get(self.committed..).unwrap_or_default()
    }

    /// Whether a letter has to be committed with the rows.
    pub(crate) fn has_open_letters(&self) -> bool {
        !self.open_letters().is_empty()
    }

    /// Ends a batch's transaction, after its rows: the dead letters, those of `refused` rows too, then the commit.
    /// `patience` is for each step.
    pub(crate) async fn finish(
        &self,
        client: &Client,
        outcome: Outcome,
        refused: &RefusedParts,
        started: Instant,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        for letters in [self.open_letters(), &refused.letters] {
            let mut rest = letters;
            while !rest.is_empty() {
                let piece = dead_letter::piece(rest, LETTER_BYTES_PER_TRANSACTION);
                if !in_time(patience, dead_letter::insert(client, piece)).await? {
                    self.cut.store(true, Ordering::Relaxed);
                }
                rest = rest.get(piece.len()..).unwrap_or_default();
            }
        }
        if outcome.rows + outcome.joined == 0 {
            in_time(patience, leave_a_record(client)).await?;
        }
        let copied_at = Instant::now();
        in_time(patience, transaction::commit(client)).await?;
        Ok(Committed {
            rows: outcome.rows,
            joined: outcome.joined,
            duplicates: outcome.good.saturating_sub(outcome.rows + outcome.joined + refused.parts.len()),
            copied: copied_at.duration_since(started),
            committed: copied_at.elapsed(),
        })
    }

    /// The number the next message will have.
    #[must_use]
    pub fn next(&self) -> usize {
        self.messages.len()
    }

    /// Takes a decoded message in.
    pub fn push(&mut self, mut delivery: Delivery) {
        self.bytes += delivery.size();
        self.unpacked += delivery.payload.len().saturating_sub(delivery.held);
        let admissions = std::mem::take(&mut self.admissions_of_next);
        match &mut delivery.admissions {
            Some(known) => known.update(admissions),
            None if admissions.is_empty() => {}
            none => *none = Some(Box::new(admissions)),
        }
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

    #[must_use]
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Messages and the room they take in the queue.
    #[must_use]
    pub fn room(&self) -> (usize, usize) {
        (self.messages.len(), self.bytes)
    }

    /// Bytes that messages hold since they were decompressed, on top of their room in the queue.
    #[must_use]
    pub fn unpacked(&self) -> usize {
        self.unpacked
    }

    /// Takes the messages out, to be decoded again.
    pub fn take(&mut self) -> Vec<Delivery> {
        self.forget();
        std::mem::take(&mut self.messages)
    }

    /// Refused parts, with a letter or without.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.rejected.len()
    }

    /// Refused parts without a letter, since their device had too many.
    #[must_use]
    pub fn suppressed(&self) -> usize {
        self.suppressed
    }

    /// What the dead letters weigh.
    #[must_use]
    pub fn letter_bytes(&self) -> usize {
        self.letters.iter().map(DeadLetter::weight).sum()
    }

    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark { letters: self.letters.len(), rejected: self.rejected.len(), suppressed: self.suppressed }
    }

    /// Forgets what was refused since, which was of the message about to be pushed.
    pub fn truncate(&mut self, mark: Mark) {
        self.letters.truncate(mark.letters);
        self.rejected.truncate(mark.rejected);
        self.suppressed = mark.suppressed;
        self.admissions_of_next.restart();
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
        self.admissions_of_next.parts += 1;
        let parts = self.admissions_of_next.parts;
        if parts <= LETTERS_PER_MESSAGE {
            let letter = self.new_letter(delivery, part, reason, &error, now_us);
            self.admit(delivery, part, letter);
            return;
        }
        // Asked again for each part: another kind of part has another allowance.
        if !self.admissions_of_next.whole {
            let whole = &delivery.payload;
            let letter = self.new_letter(delivery, whole, reason, &as_a_whole(&error), now_us);
            self.admissions_of_next.whole = self.admit(delivery, whole, letter);
        }
    }

    /// Keeps the letter of a part of the message about to be pushed if its device may leave it.
    fn admit(&mut self, delivery: &Delivery, part: &[u8], letter: DeadLetter) -> bool {
        let (origin, place) = (Origin::of(letter.reason), place_of(&delivery.payload, part));
        let known = delivery.admissions.as_ref().and_then(|admissions| admissions.get(origin, place));
        let limit = &self.limit;
        let ask = || {
            let admit = |limit: &LetterLimit| limit.admit(origin, &letter.topic, letter.weight());
            known.unwrap_or_else(|| limit.as_ref().is_none_or(admit))
        };
        let admitted = self.admissions_of_next.decide(origin, place, ask);
        if admitted {
            self.letters.push(letter);
        } else {
            self.suppressed += 1;
        }
        admitted
    }

    fn new_letter(
        &self,
        delivery: &Delivery,
        part: &[u8],
        reason: Reason,
        error: &str,
        received_at_us: i64,
    ) -> DeadLetter {
        let payload = slice_of(&delivery.payload, part);
        DeadLetter::new(
            received_at_us,
            self.source,
            &delivery.topic,
            reason,
            error,
            payload,
            self.max_payload,
        )
    }

    /// Reasons of everything that ended as a dead letter.
    pub fn reasons(&self) -> impl Iterator<Item = Reason> + '_ {
        self.rejected.iter().map(|(_, reason)| *reason)
    }

    /// The letters, those of rows that the database refused too once they are committed.
    #[must_use]
    pub fn letters(&self) -> &[DeadLetter] {
        &self.letters
    }

    /// What to tell the source, in receipt order. Takes the messages out.
    pub fn settle(&mut self) -> Vec<Settled> {
        let mut rejected = std::mem::take(&mut self.rejected);
        rejected.sort_by_key(|(number, _)| *number);
        let cut = *self.cut.get_mut();
        let mut rejected = rejected.into_iter().peekable();
        let mut settled = Vec::with_capacity(self.messages.len());
        for (number, delivery) in self.messages.drain(..).enumerate() {
            let mut reason = None;
            while let Some((_, next)) = rejected.next_if(|(of, _)| *of == number) {
                reason.get_or_insert(next);
            }
            if let Some(ack) = delivery.ack {
                let admitted = delivery.admissions.as_ref().is_some_and(|known| known.has_admitted());
                let refused = reason.map(|reason| {
                    let (topic, payload) = (delivery.topic, delivery.payload);
                    Box::new(Refused { reason, topic, payload, has_row: admitted && !cut })
                });
                settled.push(Settled { ack, rejected: refused });
            }
        }
        settled
    }
}

/// A transaction that writes nothing does not wait for the standby; yet its duplicates may be rows of an earlier try that
/// only this machine has. With a record of its own it waits for those too.
async fn leave_a_record(client: &Client) -> Result<(), WriteError> {
    Ok(client
        .batch_execute("SELECT pg_catalog.pg_logical_emit_message(true, 'tier0', 'nothing new')")
        .await?)
}

/// A part of a payload as bytes of its own, sharing its memory.
fn slice_of(payload: &Bytes, part: &[u8]) -> Bytes {
    if part.is_empty() { Bytes::new() } else { payload.slice_ref(part) }
}

/// Where a part of a payload begins: what tells it from other parts.
fn place_of(payload: &Bytes, part: &[u8]) -> usize {
    part.as_ptr().addr().wrapping_sub(payload.as_ptr().addr())
}

/// The error of a letter that holds the whole message.
fn as_a_whole(next: &str) -> String {
    format!(
        "more than {LETTERS_PER_MESSAGE} parts of the message are refused; this is the message as a whole. The next reason: {next}"
    )
}

#[cfg(test)]
mod tests;
