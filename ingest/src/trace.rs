//! What is told of a batch when it is settled: how long its messages waited, was it tried more than once, which part of
//! the commit took its time. One trace for a batch, never one for a reading.

use service::traces::{Moment, Span};
use tokio::time::Instant;

use crate::batch::Path;
use crate::batch::committed::Committed;
use crate::writer::filled::Filled;

/// Failed tries told of one by one; an outage of an hour has thousands.
const FAILED_TRIES: usize = 8;

/// The tries to commit one batch.
#[derive(Debug)]
pub(crate) struct Tries {
    /// All of them.
    pub(crate) count: usize,
    /// Of the last one.
    pub(crate) path: Path,
    failed: Vec<(Instant, Instant, String)>,
}

impl Tries {
    pub(crate) fn new() -> Self {
        Self { count: 0, path: Path::Fast, failed: Vec::new() }
    }

    pub(crate) fn note(&mut self, started: Instant, error: impl FnOnce() -> String) {
        if self.failed.len() < FAILED_TRIES {
            self.failed.push((started, Instant::now(), error()));
        }
    }
}

/// A batch from the receipt of its oldest message to its settlement.
#[derive(Debug)]
pub(crate) struct BatchTrace<'b> {
    pub(crate) source: &'static str,
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
    pub(crate) filled: &'b Filled,
    pub(crate) sealed: Instant,
    pub(crate) tries: Tries,
    pub(crate) committed: &'b Committed,
    pub(crate) dead_letters: usize,
    /// When COMMIT was answered.
    pub(crate) done: Instant,
}

impl BatchTrace<'_> {
    /// Something else happened than that good rows were committed at once.
    pub(crate) fn is_eventful(&self) -> bool {
        self.tries.count > 1 || self.dead_letters > 0
    }

    pub(crate) fn into_span(self) -> Span {
        let moment = Moment::now();
        let span = |name, from, to| Span::new(name, moment.time_of(from), moment.time_of(to));
        let committing = self.done - self.committed.committed;
        let copying = committing - self.committed.copied;
        let mut batch = span("batch", self.filled.oldest, moment.instant())
            .with("messaging.system", self.source)
            .with("messaging.batch.message_count", self.messages)
            .with("tier0.bytes", self.bytes)
            .with("tier0.rows", self.committed.rows)
            .with("tier0.duplicates", self.committed.duplicates)
            .with("tier0.dead_letters", self.dead_letters)
            .with("tier0.tries", self.tries.count)
            .with("tier0.path", self.tries.path.as_str())
            .with("tier0.closed_by", self.filled.closed_by.as_str());
        batch.parts.push(span("queue", self.filled.oldest, self.filled.begun));
        batch.parts.push(span("fill", self.filled.begun, self.sealed));
        let failed = self.tries.failed.into_iter();
        batch.parts.extend(failed.map(|(from, to, error)| span("try", from, to).failed(error)));
        batch.parts.push(span("copy", copying, committing));
        batch.parts.push(span("commit", committing, self.done));
        batch.parts.push(span("settle", self.done, moment.instant()));
        batch
    }
}
