//! Acknowledgements in receipt order, even when batches commit out of order (MQTT-4.6.0-2).
//!
//! Writers report a batch by its ticket; the source takes what has become free. Neither ever waits for the other.
//! What is held here is never more than the acknowledgements of the messages in flight, which the source bounds.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::dead_letter::Reason;
use crate::delivery::Ack;

/// What became of one message.
#[derive(Debug, PartialEq, Eq)]
pub struct Settled {
    pub ack: Ack,
    /// When the message, or a part of it, ended as a dead letter.
    pub rejected: Option<Box<Refused>>,
}

/// A message that ended as a dead letter, for a source that passes such messages on to the broker.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    pub reason: Reason,
    pub topic: Bytes,
    pub payload: Bytes,
    /// Its letter is in `dead_letters`, with its payload. Not when there were too many, or no more room for them.
    pub has_row: bool,
}

#[derive(Debug)]
struct State {
    /// The oldest ticket that is not reported yet.
    next: u64,
    /// Reported, but an older ticket is still open.
    early: BTreeMap<u64, Vec<Settled>>,
    ready: VecDeque<Vec<Settled>>,
    /// When the oldest message of each batch not yet reported was received.
    open: BTreeMap<u64, Instant>,
    /// Writers still at work.
    writers: usize,
}

/// Between the writers and one source.
#[derive(Debug)]
pub struct Settlements {
    state: Mutex<State>,
    changed: Notify,
}

impl Settlements {
    /// For this many writers, each of which calls [`Settlements::leave`] when it ends.
    #[must_use]
    pub fn new(writers: usize) -> Self {
        let state =
            State { next: 0, early: BTreeMap::new(), ready: VecDeque::new(), open: BTreeMap::new(), writers };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch has been begun; its oldest message was received then.
    pub fn begin(&self, ticket: u64, oldest: Instant) {
        self.state().open.insert(ticket, oldest);
    }

    /// Age of the oldest uncommitted message since its receipt. Zero when all are.
    #[must_use]
    pub fn oldest(&self) -> Duration {
        self.state().open.values().min().map(Instant::elapsed).unwrap_or_default()
    }

    /// Reports a committed batch. Tickets count from 0 without a gap, in the order the batches were taken from the
    /// queue.
    pub fn report(&self, ticket: u64, settled: Vec<Settled>) {
        let mut state = self.state();
        state.open.remove(&ticket);
        state.early.insert(ticket, settled);
        let mut freed = false;
        while let Some(settled) = {
            let next = state.next;
            state.early.remove(&next)
        } {
            state.next += 1;
            if !settled.is_empty() {
                state.ready.push_back(settled);
                freed = true;
            }
        }
        drop(state);
        if freed {
            self.changed.notify_one();
        }
    }

    /// A writer has ended.
    pub fn leave(&self) {
        self.state().writers -= 1;
        self.changed.notify_one();
    }

    /// The next messages to acknowledge, oldest first; `None` when all writers have ended and nothing is left. For
    /// one source at a time; cancelling loses nothing.
    pub async fn take(&self) -> Option<Vec<Settled>> {
        loop {
            {
                let mut state = self.state();
                if let Some(settled) = state.ready.pop_front() {
                    return Some(settled);
                }
                if state.writers == 0 {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    /// As [`Settlements::take`], without waiting.
    pub fn try_take(&self) -> Option<Vec<Settled>> {
        self.state().ready.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_open_message_is_known() {
        let settlements = Settlements::new(1);
        assert_eq!(settlements.oldest(), Duration::ZERO);
        settlements.begin(0, Instant::now());
        tokio::time::advance(Duration::from_secs(3)).await;
        settlements.begin(1, Instant::now());
        assert_eq!(settlements.oldest(), Duration::from_secs(3));
        settlements.report(0, vec![]);
        assert_eq!(settlements.oldest(), Duration::ZERO);
    }

    fn settled(id: u64) -> Settled {
        Settled { ack: Ack { connection: 1, id }, rejected: None }
    }

    proptest! {
        #[test]
        fn whatever_order_batches_commit_in_they_leave_in_receipt_order(
            order in Just((0..20_u64).collect::<Vec<_>>()).prop_shuffle(),
            empty in prop::collection::vec(any::<bool>(), 20),
        ) {
            let settlements = Settlements::new(1);
            let mut left = Vec::new();
            for ticket in order {
                let acks = if empty[ticket as usize] { vec![] } else { vec![settled(ticket * 2), settled(ticket * 2 + 1)] };
                settlements.report(ticket, acks);
                while let Some(ready) = settlements.try_take() {
                    left.extend(ready.into_iter().map(|s| s.ack.id));
                }
            }
            let expected: Vec<u64> = (0..20).filter(|t| !empty[*t as usize]).flat_map(|t| [t * 2, t * 2 + 1]).collect();
            prop_assert_eq!(left, expected);
        }
    }
}
