//! Whether the broker should have a session for this client, and what it means when it has none. Asks no database: the
//! record is handed in, and what changes is handed out ([`super::session_record`]).

use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::ConnectionError;
use super::reason;
use super::reconnect::RIVAL_GONE;

/// What is to be recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct State {
    /// Subscribed now.
    pub subscribed: bool,
    /// When a session was found lost by this process.
    pub lost_at: Option<Timestamp>,
    /// The session was ended on purpose.
    pub ended: bool,
}

/// What a connection without, or with, a session means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The broker had kept the session.
    Resumed,
    /// Nobody knows of an earlier one.
    New,
    /// There was one, last in use at about this time.
    Lost { last_seen: Timestamp },
}

/// One per process. At first nothing is known of an earlier session.
#[derive(Debug, Default)]
pub struct SessionMemory {
    /// When the session that the broker should have was last in use.
    last_seen: Mutex<Option<Timestamp>>,
    /// What the session was subscribed to under a former setting, and may still be.
    old_filter: Mutex<Option<String>>,
    /// When another process was last found to have held the session in between.
    rival: Mutex<Option<Instant>>,
    state: watch::Sender<State>,
}

impl SessionMemory {
    /// By the record the session was last in use then.
    pub fn recall(&self, last_seen: Timestamp) {
        *self.last_seen() = Some(last_seen);
    }

    /// By the record the session was subscribed to this, which is not the present setting.
    pub fn recall_filter(&self, filter: String) {
        *self.old_filter.lock().unwrap_or_else(PoisonError::into_inner) = Some(filter);
    }

    pub(super) fn old_filter(&self) -> Option<String> {
        self.old_filter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The broker has answered to UNSUBSCRIBE.
    pub(super) fn old_filter_ended(&self, code: u8) {
        let Some(filter) = self.old_filter.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        // A failure; 17 says that there was none.
        if code >= 0x80 {
            tracing::warn!(
                filter,
                reason = reason::name(code),
                "the broker does not end the subscription to the former mqtt_consumer.filter: what matches it comes too"
            );
        } else {
            tracing::info!(filter, "the subscription to the former mqtt_consumer.filter is ended");
        }
        // To be recorded.
        self.state.send_modify(|_| {});
    }

    /// By the record another process has held the session since this one did.
    pub fn found_rival(&self) {
        *self.rival.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// What the end of a connection means. Some brokers (Mosquitto 2.0.11) close without a word when another process takes
    /// the session over.
    pub(super) fn explain(&self, error: ConnectionError, client_id: &str) -> ConnectionError {
        let is_silent = match &error {
            ConnectionError::Closed => true,
            ConnectionError::Io(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
            _ => false,
        };
        let rival = *self.rival.lock().unwrap_or_else(PoisonError::into_inner);
        if is_silent && rival.is_some_and(|found| found.elapsed() < RIVAL_GONE) {
            return ConnectionError::TakenOver(client_id.to_owned());
        }
        error
    }

    /// Where changes are seen.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    fn last_seen(&self) -> MutexGuard<'_, Option<Timestamp>> {
        self.last_seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker has accepted a connection.
    pub(super) fn opened(&self, session_present: bool, now: Timestamp) -> Verdict {
        if session_present {
            return Verdict::Resumed;
        }
        // The broker has made a new one with this connection, and is not to be blamed twice.
        match self.last_seen().take() {
            None => Verdict::New,
            Some(last_seen) => {
                self.state.send_modify(|state| state.lost_at = Some(now));
                Verdict::Lost { last_seen }
            }
        }
    }

    /// The broker has confirmed the subscription.
    pub(super) fn subscribed(&self, now: Timestamp) {
        *self.last_seen() = Some(now);
        self.state.send_modify(|state| state.subscribed = true);
    }

    /// The connection has ended.
    pub(super) fn closed(&self, now: Timestamp) {
        if self.state.borrow().subscribed {
            *self.last_seen() = Some(now);
            self.state.send_modify(|state| state.subscribed = false);
        }
    }

    /// The session was ended on purpose.
    pub(super) fn ended(&self) {
        *self.last_seen() = None;
        self.state.send_modify(|state| state.ended = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[tokio::test]
    async fn a_session_is_lost_when_there_was_one_and_once() {
        let fresh = SessionMemory::default();
        assert_eq!(fresh.opened(false, at(1)), Verdict::New);
        // Subscribed at 2, cut at 5; then the broker has forgotten it.
        fresh.subscribed(at(2));
        fresh.closed(at(5));
        assert_eq!(fresh.opened(true, at(6)), Verdict::Resumed);
        assert_eq!(fresh.opened(false, at(7)), Verdict::Lost { last_seen: at(5) });
        // That connection broke before it was subscribed: not lost twice.
        assert_eq!(fresh.opened(false, at(8)), Verdict::New);
        assert_eq!(fresh.watch().borrow().lost_at, Some(at(7)));

        // A connection that is closed without a word.
        assert!(matches!(fresh.explain(ConnectionError::Closed, "a"), ConnectionError::Closed));
        fresh.found_rival();
        assert!(matches!(fresh.explain(ConnectionError::Closed, "a"), ConnectionError::TakenOver(_)));
        let other = fresh.explain(ConnectionError::Timeout("PINGREQ"), "a");
        assert!(matches!(other, ConnectionError::Timeout(_)));

        let known = SessionMemory::default();
        known.recall(at(1));
        assert_eq!(known.opened(false, at(9)), Verdict::Lost { last_seen: at(1) });
        let left = SessionMemory::default();
        left.recall(at(1));
        left.ended();
        assert_eq!(left.opened(false, at(9)), Verdict::New);
    }
}
