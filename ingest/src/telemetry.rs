//! A batch of readings: one COPY buffer, filled as messages are taken from the queue, and its way into the table.
//!
//! Fast path: plain COPY. When some rows are stored already, or the database refuses some, the same buffer goes
//! through a temporary table and is merged; refused rows become dead letters in the same transaction.

mod merge;

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use deadpool_postgres::Client;
use futures_util::SinkExt;
use tokio::time::Instant;

use crate::copy;
use crate::dead_letter::{self, DeadLetter, Reason};
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::reading::{self, Reading, Rejection, Rules, Visitor};
use crate::settlement::Settled;

/// The columns a reading fills, in the order they are encoded.
const COLUMNS: &str =
    "device_id, device_type, site_id, timestamp_utc, firmware, metrics, status, location, tags";
const FIELDS: i16 = 9;

/// Readings and refused messages that are committed together.
#[derive(Debug)]
pub struct Batch {
    source: &'static str,
    deliveries: Vec<Delivery>,
    rows: Vec<Row>,
    letters: Vec<DeadLetter>,
    /// Refused parts by the number of their delivery.
    rejected: Vec<(usize, Reason)>,
    buffer: BytesMut,
    /// The buffer once the batch is closed, header and trailer included.
    sealed: Bytes,
    delivered_bytes: usize,
    rules: Rules,
}

/// Where a row is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    /// End of its encoding in the buffer; it starts where the row before ends.
    end: usize,
    delivery: usize,
    timestamp_us: i64,
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
    Fast,
    Merge,
}

impl Batch {
    /// An empty batch. `source` goes into dead letters.
    #[must_use]
    pub fn new(source: &'static str, rules: Rules) -> Self {
        let mut batch = Self {
            source,
            deliveries: Vec::new(),
            rows: Vec::new(),
            letters: Vec::new(),
            rejected: Vec::new(),
            buffer: BytesMut::new(),
            sealed: Bytes::new(),
            delivered_bytes: 0,
            rules,
        };
        batch.clear();
        batch
    }

    /// Empties the batch; its memory is kept for the next one.
    pub fn clear(&mut self) {
        self.deliveries.clear();
        self.rows.clear();
        self.letters.clear();
        self.rejected.clear();
        self.delivered_bytes = 0;
        // The last holder of the buffer gives it back; otherwise a new one is made.
        let sealed = std::mem::take(&mut self.sealed);
        self.buffer = sealed.try_into_mut().unwrap_or_else(|_| BytesMut::with_capacity(1 << 20));
        self.buffer.clear();
        self.buffer.put_slice(copy::HEADER);
    }

    /// The window of accepted times moves with the clock.
    pub fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Decodes and encodes one message.
    pub fn push(&mut self, delivery: Delivery, now_us: i64) {
        self.delivered_bytes += delivery.size();
        let mut filling = Filling {
            delivery: &delivery,
            number: self.deliveries.len(),
            start: (self.rows.len(), self.buffer.len(), self.letters.len(), self.rejected.len()),
            now_us,
            source: self.source,
            rows: &mut self.rows,
            buffer: &mut self.buffer,
            letters: &mut self.letters,
            rejected: &mut self.rejected,
        };
        reading::visit(&delivery.topic, &delivery.payload, &self.rules, &mut filling);
        self.deliveries.push(delivery);
    }

    /// Rows and dead letters.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len() + self.letters.len()
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
        self.buffer.len()
    }

    /// When the oldest message was received.
    #[must_use]
    pub fn oldest(&self) -> Option<Instant> {
        self.deliveries.first().map(|delivery| delivery.received)
    }

    /// Timestamps of the rows, microseconds since 1970.
    pub fn timestamps(&self) -> impl Iterator<Item = i64> + '_ {
        self.rows.iter().map(|row| row.timestamp_us)
    }

    /// Reasons of everything that ended as a dead letter.
    pub fn reasons(&self) -> impl Iterator<Item = Reason> + '_ {
        self.rejected.iter().map(|(_, reason)| *reason)
    }

    /// Closes the batch: nothing may be pushed after this until it is cleared.
    pub fn seal(&mut self) {
        self.buffer.put_slice(copy::TRAILER);
        self.sealed = self.buffer.split().freeze();
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
        if self.rows.is_empty() && self.letters.is_empty() {
            return Ok(Committed::default());
        }
        let outcome = match path {
            Path::Fast => self.commit_fast(client).await,
            Path::Merge => self.commit_merged(client).await,
        };
        if matches!(
            outcome,
            Err(WriteError::Duplicate | WriteError::MissingPartition | WriteError::Data { .. })
        ) {
            client.batch_execute("ROLLBACK").await?;
        }
        outcome
    }

    async fn commit_fast(&self, client: &Client) -> Result<Committed, WriteError> {
        let started = Instant::now();
        if self.rows.is_empty() {
            client.batch_execute("BEGIN").await?;
            return self.finish(client, Committed::default(), &[], started).await;
        }
        let sql = format!("COPY device_telemetry ({COLUMNS}) FROM STDIN BINARY");
        let statement = client.prepare_cached(&sql).await?;
        // Both requests leave together; the server answers them in order.
        let (begun, sink) = tokio::join!(client.batch_execute("BEGIN"), client.copy_in(&statement));
        begun?;
        let sink = sink?;
        futures_util::pin_mut!(sink);
        for message in copy::messages(self.sealed.clone()) {
            sink.feed(message).await?;
        }
        if !self.letters.is_empty() {
            let rows = usize::try_from(sink.finish().await?).unwrap_or(usize::MAX);
            return self.finish(client, Committed { rows, ..Committed::default() }, &[], started).await;
        }
        // COMMIT leaves with the end of the COPY. If the COPY failed, it is a rollback.
        let copy = async {
            let rows = sink.finish().await;
            (rows, Instant::now())
        };
        let ((rows, copied_at), committed) = tokio::join!(copy, client.batch_execute("COMMIT"));
        let rows = usize::try_from(rows?).unwrap_or(usize::MAX);
        committed?;
        Ok(Committed {
            rows,
            duplicates: 0,
            copied: copied_at.duration_since(started),
            committed: copied_at.elapsed(),
        })
    }

    /// Dead letters, then COMMIT.
    async fn finish(
        &self,
        client: &Client,
        mut done: Committed,
        more_letters: &[DeadLetter],
        started: Instant,
    ) -> Result<Committed, WriteError> {
        dead_letter::insert(client, &self.letters).await?;
        dead_letter::insert(client, more_letters).await?;
        let copied_at = Instant::now();
        client.batch_execute("COMMIT").await?;
        done.copied = copied_at.duration_since(started);
        done.committed = copied_at.elapsed();
        Ok(done)
    }

    /// The encoded rows `from..to` as one complete COPY.
    fn slice(&self, from: usize, to: usize) -> Bytes {
        let start = from
            .checked_sub(1)
            .and_then(|before| self.rows.get(before))
            .map_or(copy::HEADER.len(), |row| row.end);
        let end = to.checked_sub(1).and_then(|last| self.rows.get(last)).map_or(start, |row| row.end);
        self.sealed.slice(start..end)
    }
}

/// Fills a batch from one delivery.
struct Filling<'b> {
    delivery: &'b Delivery,
    number: usize,
    /// Lengths of everything before this delivery.
    start: (usize, usize, usize, usize),
    now_us: i64,
    source: &'static str,
    rows: &'b mut Vec<Row>,
    buffer: &'b mut BytesMut,
    letters: &'b mut Vec<DeadLetter>,
    rejected: &'b mut Vec<(usize, Reason)>,
}

impl<'a> Visitor<'a> for Filling<'_> {
    fn reading(&mut self, reading: &Reading<'a>) {
        let buffer = &mut *self.buffer;
        copy::row(buffer, FIELDS);
        copy::text(buffer, &reading.device_id);
        copy::text(buffer, &reading.device_type);
        copy::text(buffer, &reading.site_id);
        copy::timestamptz(buffer, reading.timestamp_us);
        match &reading.firmware {
            Some(firmware) => copy::text(buffer, firmware),
            None => copy::null(buffer),
        }
        copy::jsonb(buffer, reading.metrics);
        for document in [reading.status, reading.location, reading.tags] {
            match document {
                Some(document) => copy::jsonb(buffer, document),
                None => copy::null(buffer),
            }
        }
        self.rows.push(Row {
            end: self.buffer.len(),
            delivery: self.number,
            timestamp_us: reading.timestamp_us,
        });
    }

    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        self.letters.push(DeadLetter {
            received_at_us: self.now_us,
            source: self.source,
            topic: self.delivery.topic.clone(),
            reason: rejection.reason,
            error: rejection.error,
            payload: self.delivery.payload.slice_ref(part),
        });
        self.rejected.push((self.number, rejection.reason));
    }

    fn restart(&mut self) {
        let (rows, bytes, letters, rejected) = self.start;
        self.rows.truncate(rows);
        self.buffer.truncate(bytes);
        self.letters.truncate(letters);
        self.rejected.truncate(rejected);
    }
}
