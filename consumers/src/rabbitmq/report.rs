//! What an administrator should know about the queue, said when a connection is opened.
//!
//! Each thing once: a reconnect every few seconds must not fill the log with what is known.

use amqp::{Broker, Declared};

use super::metrics::SourceMetrics;

/// Remembers what has been said.
#[derive(Debug)]
pub struct Report {
    broker: Broker,
    metrics: SourceMetrics,
    consumed: bool,
    difference: Option<String>,
    no_dead_letters: Option<String>,
}

impl Report {
    #[must_use]
    pub fn new(broker: Broker, metrics: SourceMetrics) -> Self {
        Self { broker, metrics, consumed: false, difference: None, no_dead_letters: None }
    }

    /// A connection was opened and this is what it found.
    pub fn opened(&mut self, declared: &Declared) {
        let queue = &self.broker.queue;
        if declared.created && (self.consumed || declared.had_been_deleted) {
            self.metrics.queue_deleted.inc();
            tracing::error!(
                queue,
                "the queue was gone and has been made anew. The events that waited in it are lost unless their publishers send \
                 them again: ask them for the time since the last event in user_sessions (docs/runbooks/rabbitmq-queue.md)"
            );
        } else if declared.created {
            tracing::info!(queue, "the queue was not there and has been made");
        }
        let others = declared.found.consumers;
        if others > 0 && !self.consumed {
            tracing::warn!(
                queue,
                others,
                "others consume from this queue too. Each event goes to one of them: all must be rabbitmq-consumers of this \
                 database (rabbitmqctl list_consumers)"
            );
        }
        if let Some(difference) = &declared.difference
            && self.difference.as_ref() != Some(difference)
        {
            tracing::info!(
                difference,
                "the queue is not as this consumer would make it, and is used as it is. If it has no dead-letter exchange, \
                 what the broker removes from it by itself (delivery limit, expiry, limit of length) is lost: \
                 docs/runbooks/rabbitmq-queue.md"
            );
        }
        self.difference.clone_from(&declared.difference);
        if let Some(problem) = &declared.no_dead_letters
            && self.no_dead_letters.as_ref() != Some(problem)
        {
            tracing::warn!(
                problem,
                "no dead-letter queue: refused messages are in dead_letters only, and what the broker itself removes from the \
                 queue (an expired message, a limit set by a policy) is lost"
            );
        }
        self.no_dead_letters.clone_from(&declared.no_dead_letters);
        self.consumed = true;
    }
}
