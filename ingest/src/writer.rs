//! A writer: takes messages from the queue, makes a batch, commits it, reports it. Tries for as long as it takes.
//!
//! It never loses a batch and never reports one that is not committed. It ends when the queue is closed and empty.

use std::sync::Arc;
use std::time::Duration;

use service::backoff::Backoff;
use service::traces::Tracer;
use tokio::time::{Instant, timeout, timeout_at};

use crate::batch::{Batch, Committed, Path};
use crate::database::Database;
use crate::failure::WriteError;
use crate::metrics::Metrics;
use crate::partitions::{self, Layout};
use crate::queue::Receiver;
use crate::reading::Rules;
use crate::settings::IngestSettings;
use crate::settlement::Settlements;
use crate::trace::{Story, Tries};

const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What closed a batch; the metric's label.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ClosedBy {
    Rows,
    Bytes,
    Age,
    Drain,
}

impl ClosedBy {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Bytes => "bytes",
            Self::Age => "age",
            Self::Drain => "drain",
        }
    }
}

/// How a batch was filled.
#[derive(Debug)]
pub(crate) struct Filled {
    ticket: u64,
    pub(crate) closed_by: ClosedBy,
    /// When its oldest message was received, and when that was taken from the queue.
    pub(crate) oldest: Instant,
    pub(crate) begun: Instant,
}

/// One of several; each has one connection at a time. `B` is what it commits.
#[derive(Debug)]
pub struct Writer<B: Batch> {
    /// Goes into dead letters, for instance `mqtt`.
    pub source: &'static str,
    pub settings: IngestSettings,
    pub queue: Receiver<B::Memory>,
    pub settlements: Arc<Settlements>,
    pub database: Database,
    pub metrics: Metrics,
    pub tracer: Tracer,
}

impl<B: Batch> Writer<B> {
    /// Runs until the queue is closed and empty.
    pub async fn run(self) {
        let mut batch = B::new(self.source, self.rules(now_us()));
        while let Some(filled) = self.fill(&mut batch).await {
            self.metrics.batches.with_label_values(&[filled.closed_by.as_str()]).inc();
            self.metrics.batch_rows.observe(batch.parts() as f64);
            batch.seal();
            let sealed = Instant::now();
            let (committed, tries) = self.commit(&mut batch).await;
            let done = Instant::now();
            let dead_letters = self.count(&batch, &committed);
            let (messages, bytes) = batch.deliveries().room();
            self.settlements.report(filled.ticket, batch.deliveries_mut().settle());
            self.queue.level().free(messages, bytes);
            if self.tracer.is_on() {
                let (source, filled, committed) = (self.source, &filled, &committed);
                let story =
                    Story { source, messages, bytes, filled, sealed, tries, committed, dead_letters, done };
                self.tracer.record(story.is_eventful(), || story.tell());
            }
            batch.clear();
        }
        self.settlements.leave();
    }

    fn rules(&self, now_us: i64) -> Rules {
        let (oldest_us, newest_us) = Layout::new(&self.settings).window(now_us);
        let max_payload_bytes = usize::try_from(self.settings.max_payload.as_u64()).unwrap_or(usize::MAX);
        Rules { oldest_us, newest_us, max_payload_bytes }
    }

    /// Fills an empty batch. `None` when the queue is closed and empty.
    async fn fill(&self, batch: &mut B) -> Option<Filled> {
        let max_bytes = usize::try_from(self.settings.max_bytes.as_u64()).unwrap_or(usize::MAX);
        let mut intake = self.queue.intake().await;
        let mut chunk = intake.receiver.recv().await?;
        let ticket = intake.next_ticket;
        intake.next_ticket += 1;
        let begun = Instant::now();
        let oldest = chunk.first().map_or(begun, |delivery| delivery.received);
        self.settlements.begin(ticket, oldest);
        self.metrics.stage.with_label_values(&["queue"]).observe((begun - oldest).as_secs_f64());
        let mut encoding = Duration::ZERO;
        let closed_by = loop {
            let started = Instant::now();
            self.metrics.messages.inc_by(chunk.len() as u64);
            let now_us = now_us();
            batch.set_rules(self.rules(now_us));
            let before = batch.parts();
            for delivery in chunk {
                batch.push(delivery, now_us, &mut intake.memory);
            }
            let decoded = batch.parts() - before;
            self.metrics.rows_received.inc_by(decoded as u64);
            self.metrics.rows_in_flight.add(i64::try_from(decoded).unwrap_or(i64::MAX));
            encoding += started.elapsed();
            if batch.parts() >= self.settings.max_rows {
                break ClosedBy::Rows;
            }
            if batch.bytes() >= max_bytes {
                break ClosedBy::Bytes;
            }
            // What waits already is taken whatever its age: a backlog must make batches larger, not smaller.
            if let Ok(next) = intake.receiver.try_recv() {
                chunk = next;
                continue;
            }
            let deadline = oldest + self.settings.max_age;
            match timeout_at(deadline, intake.receiver.recv()).await {
                Ok(Some(next)) => chunk = next,
                Ok(None) => break ClosedBy::Drain,
                Err(_) => break ClosedBy::Age,
            }
        };
        self.metrics.stage.with_label_values(&["encode"]).observe(encoding.as_secs_f64());
        Some(Filled { ticket, closed_by, oldest, begun })
    }

    /// Commits, however long it takes.
    async fn commit(&self, batch: &mut B) -> (Committed, Tries) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut tries = Tries::new();
        let mut failing_since = None;
        loop {
            let started = Instant::now();
            tries.count += 1;
            let error = match self.attempt(batch, tries.path).await {
                Ok(committed) => {
                    if let Some(since) = failing_since {
                        let since: Instant = since;
                        tracing::info!(after = ?since.elapsed(), rows = batch.parts(), "batch committed at last");
                    }
                    return (committed, tries);
                }
                Err(error) => error,
            };
            if self.tracer.is_on() {
                tries.note(started, || error.to_string());
            }
            match error {
                WriteError::Duplicate if tries.path != Path::Merge => {
                    self.metrics.merges.inc();
                    tries.path = Path::Merge;
                    continue;
                }
                WriteError::Data { message, .. } if tries.path == Path::Fast => {
                    tracing::warn!(error = message, "the database refuses a row; isolating it");
                    self.metrics.isolations.inc();
                    tries.path = Path::Isolate;
                    continue;
                }
                WriteError::MissingPartition => match self.make_partitions(batch).await {
                    Ok(made) if made > 0 => continue,
                    Ok(_) => tracing::error!("no partition takes a reading although all are there"),
                    Err(error) => tracing::warn!(%error, "cannot make a partition now"),
                },
                // A duplicate on the merge path is none of the readings: they are merged.
                WriteError::Unknown(_) | WriteError::Data { .. } | WriteError::Duplicate => {
                    self.metrics.unknown_errors.inc();
                    tracing::error!(%error, rows = batch.parts(), "an error nobody has classified; trying again");
                }
                error => {
                    if failing_since.is_none() {
                        tracing::warn!(%error, rows = batch.parts(), "not committed; trying until it is");
                    }
                }
            }
            failing_since.get_or_insert_with(Instant::now);
            self.metrics.retries.inc();
            tokio::time::sleep(backoff.next(rand::random())).await;
        }
    }

    async fn attempt(&self, batch: &mut B, path: Path) -> Result<Committed, WriteError> {
        let mut client = self.database.client().await?;
        let outcome = batch.commit(&mut client, path, self.database.commit_timeout()).await;
        match &outcome {
            Ok(_) => self.database.works(),
            Err(error @ (WriteError::Retry(_) | WriteError::Unknown(_))) => {
                self.database.discard(client, &error.to_string());
            }
            Err(_) => {}
        }
        outcome
    }

    async fn make_partitions(&self, batch: &B) -> Result<usize, WriteError> {
        let layout = Layout::new(&self.settings);
        let needed = layout.cells(batch.timestamps());
        let mut client = self.database.client().await?;
        let making = partitions::ensure(&mut client, &layout, &needed);
        match timeout(self.database.commit_timeout(), making).await {
            Ok(Ok(made)) => Ok(made),
            Ok(Err(error)) => {
                self.database.discard(client, "partitions not made");
                Err(error)
            }
            Err(_) => {
                self.database.discard(client, "no answer while partitions were made");
                Err(WriteError::Retry("no answer while partitions were made".into()))
            }
        }
    }

    /// Returns how many parts of it ended as dead letters.
    fn count(&self, batch: &B, committed: &Committed) -> usize {
        let metrics = &self.metrics;
        metrics.rows_committed.inc_by(committed.rows as u64);
        metrics.duplicates.inc_by(committed.duplicates as u64);
        metrics.readings.add(batch.census());
        let mut refused = 0;
        for reason in batch.deliveries().reasons() {
            metrics.dead_letters.with_label_values(&[reason.as_str()]).inc();
            refused += 1;
        }
        let settled = committed.rows + committed.duplicates + refused;
        metrics.rows_in_flight.sub(i64::try_from(settled).unwrap_or(i64::MAX));
        metrics.stage.with_label_values(&["copy"]).observe(committed.copied.as_secs_f64());
        metrics.stage.with_label_values(&["commit"]).observe(committed.committed.as_secs_f64());
        let now = now_us();
        let end_to_end = metrics.end_to_end.local();
        for timestamp in batch.timestamps() {
            end_to_end.observe((now - timestamp) as f64 / 1e6);
        }
        end_to_end.flush();
        refused
    }
}

/// The wall clock, microseconds since 1970: readings carry wall-clock times.
fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}
