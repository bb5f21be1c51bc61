//! A writer: takes messages from the queue, makes a batch, commits it, reports it. Tries for as long as it takes.
//!
//! It never loses a batch and never reports one that is not committed. It ends when the queue is closed and empty. A message
//! that keeps a batch from being stored is found, so that it does not hold up its neighbours (`split`).

mod blame;
mod commit;
pub(crate) mod filled;
mod held;
mod split;

use std::sync::Arc;
use std::time::Duration;

use service::traces::Tracer;
use tokio::time::{Instant, timeout_at};

use crate::audit::Audit;
use crate::batch::Batch;
use crate::batch::committed::Committed;
use crate::clock::Clock;
use crate::database::Database;
use crate::letter_log::LetterLog;
use crate::metrics::Metrics;
use crate::partitions::Span;
use crate::queue::Receiver;
use crate::reading::{Rules, Tolerance};
use crate::settings::IngestSettings;
use crate::settlement::{Settled, Settlements};
use crate::trace::{BatchTrace, Tries};
use filled::Filled;

/// So many times in a row the database fails on a batch before it is asked whether it takes anything else. A failover fails
/// fewer, and has no database to ask.
const TRIES_BEFORE_BLAME: usize = 5;

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

/// What became of a batch.
#[derive(Debug, Default)]
struct Stored {
    committed: Committed,
    dead_letters: usize,
    settled: Vec<Settled>,
}

impl Stored {
    fn add(&mut self, other: Self) {
        self.committed.rows += other.committed.rows;
        self.committed.duplicates += other.committed.duplicates;
        self.committed.joined += other.committed.joined;
        self.committed.copied += other.committed.copied;
        self.committed.committed += other.committed.committed;
        self.dead_letters += other.dead_letters;
        self.settled.extend(other.settled);
    }
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
    pub clock: Clock,
    pub metrics: Metrics,
    pub tracer: Tracer,
    pub letter_log: LetterLog,
    pub audit: Audit,
}

impl<B: Batch> Writer<B> {
    /// Runs until the queue is closed and empty.
    pub async fn run(self) {
        let tolerance = Arc::new(Tolerance::new(&self.settings));
        let mut batch = B::new(self.source, rules(&self.settings, self.clock.window(), &tolerance));
        while let Some(filled) = self.fill(&mut batch, &tolerance).await {
            self.metrics.batches.with_label_values(&[filled.closed_by.as_str()]).inc();
            self.metrics.batch_rows.observe(batch.parts() as f64);
            batch.seal();
            let sealed = Instant::now();
            let (messages, bytes) = batch.deliveries().room();
            let mut tries = Tries::new();
            let Stored { committed, dead_letters, settled } = self.store(&mut batch, &mut tries).await;
            let done = Instant::now();
            self.settlements.report(filled.ticket, settled);
            self.queue.level().free(messages, bytes);
            if self.tracer.is_on() {
                let (source, filled, committed) = (self.source, &filled, &committed);
                let trace = BatchTrace {
                    source,
                    messages,
                    bytes,
                    filled,
                    sealed,
                    tries,
                    committed,
                    dead_letters,
                    done,
                };
                self.tracer.record(trace.is_eventful(), || trace.into_span());
            }
            batch.clear();
        }
        self.settlements.leave();
    }

    /// Fills an empty batch. `None` when the queue is closed and empty.
    async fn fill(&self, batch: &mut B, tolerance: &Arc<Tolerance>) -> Option<Filled> {
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
            let now_us = self.clock.now_us();
            batch.set_rules(rules(&self.settings, self.clock.window(), tolerance));
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

    /// Stores all there is in a batch, however long it takes. Takes the messages out.
    async fn store(&self, batch: &mut B, tries: &mut Tries) -> Stored {
        match self.commit(batch, tries, TRIES_BEFORE_BLAME).await {
            Ok(committed) => self.committed(batch, committed),
            Err(poisoned) => self.split(batch, &poisoned).await,
        }
    }

    /// Accounts for a committed batch.
    fn committed(&self, batch: &mut B, committed: Committed) -> Stored {
        let dead_letters = self.count(batch, &committed);
        self.audit.note(batch.sample(rand::random()));
        Stored { committed, dead_letters, settled: batch.deliveries_mut().settle() }
    }

    /// Returns how many parts of it ended as dead letters.
    fn count(&self, batch: &B, committed: &Committed) -> usize {
        let metrics = &self.metrics;
        metrics.rows_committed.inc_by(committed.rows as u64);
        metrics.duplicates.inc_by(committed.duplicates as u64);
        metrics.joined.inc_by(committed.joined as u64);
        metrics.letters_suppressed.inc_by(batch.deliveries().suppressed() as u64);
        self.letter_log.note(batch.deliveries().letters());
        metrics.readings.add(batch.site_counts());
        for (what, count) in batch.tolerated().iter() {
            metrics.tolerated.with_label_values(&[what.as_str()]).inc_by(count.into());
        }
        let mut refused = 0;
        for reason in batch.deliveries().reasons() {
            metrics.dead_letters.with_label_values(&[reason.as_str()]).inc();
            refused += 1;
        }
        let settled = committed.rows + committed.duplicates + committed.joined + refused;
        metrics.rows_in_flight.sub(i64::try_from(settled).unwrap_or(i64::MAX));
        metrics.stage.with_label_values(&["copy"]).observe(committed.copied.as_secs_f64());
        metrics.stage.with_label_values(&["commit"]).observe(committed.committed.as_secs_f64());
        if self.clock.in_doubt() {
            self.clock.heard(batch.timestamps());
        }
        let now = self.clock.now_us();
        let end_to_end = metrics.end_to_end.local();
        for timestamp in batch.timestamps() {
            end_to_end.observe((now - timestamp) as f64 / 1e6);
        }
        end_to_end.flush();
        refused
    }
}

/// What readings must agree with. `window` is the oldest and newest time that is accepted now.
pub(crate) fn rules(settings: &IngestSettings, window: Span, tolerance: &Arc<Tolerance>) -> Rules {
    let (oldest_us, newest_us) = window;
    let max_payload_bytes = usize::try_from(settings.max_payload.as_u64()).unwrap_or(usize::MAX);
    let same_identity = settings.same_identity;
    Rules { oldest_us, newest_us, max_payload_bytes, same_identity, tolerance: Arc::clone(tolerance) }
}
