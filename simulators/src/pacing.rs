//! When the next message is due. Counts, never stores: being behind is a number, not a backlog.

use std::time::Duration;

/// A steady rate, or none. Time is given as the span since the publisher's start, so tests need no clock.
#[derive(Debug, Clone)]
pub struct Pacer {
    /// Messages per second; `None` is as fast as they are taken.
    rate: Option<f64>,
    /// Messages taken (or given up) so far.
    taken: u64,
    /// Part of a message, 0..1, by which this pacer runs behind the clock: spreads many pacers evenly.
    offset: f64,
    /// Being behind by more than this is given up: the machines took no readings then.
    max_behind: Duration,
    begun: Option<Duration>,
}

/// What is due now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Messages to send now.
    pub messages: u64,
    /// Messages that will never be sent because they were due too long ago.
    pub skipped: u64,
}

impl Pacer {
    /// `offset` 0..1 delays the first message by that part of the distance between two.
    #[must_use]
    pub fn new(rate: Option<f64>, offset: f64, max_behind: Duration) -> Self {
        Self { rate, taken: 0, offset, max_behind, begun: None }
    }

    /// How many messages are due at `now`. The clock starts with the first call.
    pub fn due(&mut self, now: Duration) -> Due {
        let Some(rate) = self.rate else { return Due { messages: u64::MAX, skipped: 0 } };
        let begun = *self.begun.get_or_insert(now);
        let elapsed = now.saturating_sub(begun).as_secs_f64();
        let scheduled = whole(elapsed * rate + 1.0 - self.offset);
        let behind = scheduled.saturating_sub(self.taken);
        let bound = whole(self.max_behind.as_secs_f64() * rate).max(1);
        let skipped = behind.saturating_sub(bound);
        self.taken += skipped;
        Due { messages: behind - skipped, skipped }
    }

    /// Says that `messages` of those due were sent.
    pub fn took(&mut self, messages: u64) {
        self.taken += messages;
    }

    /// Whether [`Pacer::due`] was ever called.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// The time at which the next message is due. Now (zero) when unpaced or not begun.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "2^53 messages are out of reach")]
    pub fn next(&self) -> Duration {
        match (self.rate, self.begun) {
            (Some(rate), Some(begun)) => {
                let seconds = (self.taken as f64 + self.offset) / rate;
                begun + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 4)
            }
            _ => Duration::ZERO,
        }
    }

    /// How long ago the next message was due. Zero when on time or unpaced.
    #[must_use]
    pub fn behind(&self, now: Duration) -> Duration {
        if self.rate.is_none() || self.begun.is_none() {
            return Duration::ZERO;
        }
        now.saturating_sub(self.next())
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive and floored")]
fn whole(value: f64) -> u64 {
    value.max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Ticks through `seconds` and takes what is due; returns what each tick got.
    fn run(pacer: &mut Pacer, tick: Duration, seconds: u32) -> Vec<u64> {
        let ticks = Duration::from_secs(seconds.into()).as_nanos() / tick.as_nanos();
        (0..u32::try_from(ticks).unwrap())
            .map(|i| {
                let due = pacer.due(tick * i);
                assert_eq!(due.skipped, 0);
                pacer.took(due.messages);
                due.messages
            })
            .collect()
    }

    #[test]
    fn the_rate_is_kept_exactly_and_evenly() {
        let mut pacer = Pacer::new(Some(1250.0), 0.0, Duration::from_secs(5));
        let ticks = run(&mut pacer, 10 * MS, 60);
        assert_eq!(ticks.iter().sum::<u64>(), 74_988); // up to 59.99 s, plus the one at time 0
        assert!(ticks.iter().skip(1).all(|n| (12..=13).contains(n)));
    }

    #[test]
    fn a_slow_pacer_sleeps_until_its_time() {
        let mut pacer = Pacer::new(Some(0.2), 0.5, Duration::from_secs(5));
        assert_eq!(pacer.due(100 * MS).messages, 0);
        assert_eq!(pacer.next(), Duration::from_millis(2600));
        assert_eq!(pacer.due(Duration::from_millis(2600)).messages, 1);
        pacer.took(1);
        assert_eq!(pacer.next(), Duration::from_millis(7600));
    }

    #[test]
    fn what_was_missed_is_caught_up_to_the_bound_and_the_rest_is_skipped() {
        let mut pacer = Pacer::new(Some(100.0), 0.0, Duration::from_secs(5));
        assert_eq!(pacer.due(Duration::ZERO), Due { messages: 1, skipped: 0 });
        pacer.took(1);
        let late = Duration::from_secs(60);
        assert_eq!(pacer.behind(late), late - 10 * MS);
        assert_eq!(pacer.due(late), Due { messages: 500, skipped: 5500 });
        assert_eq!(pacer.due(late), Due { messages: 500, skipped: 0 });
        pacer.took(500);
        assert_eq!(pacer.due(late).messages, 0);
        assert_eq!(pacer.behind(late), Duration::ZERO);
    }
}
