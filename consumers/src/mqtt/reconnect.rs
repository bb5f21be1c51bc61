//! How long to wait before the next connection.
//!
//! A connection is a success only when it has lasted: two processes with one client id, or a broker that ends every
//! subscription at once, would otherwise be answered at the shortest wait for ever.

use std::time::Duration;

use service::backoff::Backoff;

use super::error::ConnectionError;
use crate::LASTED;

const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// After the session was taken over. Whoever took it does the work meanwhile, so a long wait costs nothing; a short one
/// costs both, since the broker delivers again whatever was in flight.
const FIRST_RIVAL_WAIT: Duration = Duration::from_secs(1);
const LONGEST_RIVAL_WAIT: Duration = Duration::from_secs(60);
/// Far more than the longest wait of a rival: then there is none any more.
pub(super) const RIVAL_GONE: Duration = Duration::from_secs(300);

/// Waits between connections, over the life of a process.
#[derive(Debug)]
pub(super) struct Reconnect {
    ordinary: Backoff,
    rival: Backoff,
}

impl Reconnect {
    pub(super) fn new() -> Self {
        Self {
            ordinary: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
            rival: Backoff::new(FIRST_RIVAL_WAIT, LONGEST_RIVAL_WAIT),
        }
    }

    /// A connection has ended that was subscribed for so long, or `None` if it never was. Returns how long to wait; `random`
    /// is even over `0.0..1.0`.
    pub(super) fn ended(
        &mut self,
        error: &ConnectionError,
        subscribed: Option<Duration>,
        random: f64,
    ) -> Duration {
        if subscribed.is_some_and(|lasted| lasted >= LASTED) {
            self.ordinary.reset();
        }
        if subscribed.is_some_and(|lasted| lasted >= RIVAL_GONE) {
            self.rival.reset();
        }
        match error {
            ConnectionError::TakenOver(_) => self.rival.next(random),
            _ => self.ordinary.next(random),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken_over() -> ConnectionError {
        ConnectionError::TakenOver("a".into())
    }

    #[test]
    fn only_a_connection_that_lasted_makes_the_waits_short_again() {
        let mut reconnect = Reconnect::new();
        let mut waits = Vec::new();
        for lasted in [None, Some(0), Some(1), Some(9), None, None, None, None, Some(9)] {
            let lasted = lasted.map(Duration::from_secs);
            waits.push(reconnect.ended(&ConnectionError::Closed, lasted, 1.0).as_millis());
        }
        assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(reconnect.ended(&ConnectionError::Closed, Some(LASTED), 1.0), FIRST_WAIT);
    }

    /// Two processes with one client id: each is taken over when the other comes back. The broker gives the session to
    /// whoever came last.
    #[test]
    fn two_rivals_come_to_rest_at_about_two_changes_a_minute() {
        let mut rivals = [Reconnect::new(), Reconnect::new()];
        let (mut holder, mut since, mut now) = (0, Duration::ZERO, Duration::ZERO);
        let mut comes_back = [Duration::MAX, Duration::ZERO];
        let mut changes = Vec::new();
        while now < Duration::from_secs(3600) {
            let other = 1 - holder;
            now = comes_back[other];
            let wait = rivals[holder].ended(&taken_over(), Some(now - since), 0.5);
            comes_back[holder] = now + wait;
            (holder, since) = (other, now);
            changes.push(now);
        }
        let late = changes.iter().filter(|at| **at > Duration::from_secs(600)).count();
        assert!(changes.iter().filter(|at| **at < Duration::from_secs(1)).count() <= 3, "{changes:?}");
        // 50 minutes at one change in 45 s, or rarer.
        assert!(late <= 70, "{late} changes in 50 minutes");
    }
}
