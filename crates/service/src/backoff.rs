//! Waiting times between tries: exponential, jittered, capped, without an end.

use std::time::Duration;

/// Doubles from `floor` to `ceiling`; each wait is drawn evenly from the upper half of the current step, so that
/// many clients of one failed server do not come back at the same moment.
#[derive(Debug, Clone)]
pub struct Backoff {
    floor: Duration,
    ceiling: Duration,
    step: Duration,
}

impl Backoff {
    #[must_use]
    pub fn new(floor: Duration, ceiling: Duration) -> Self {
        Self { floor, ceiling, step: floor }
    }

    /// The next wait. `random` is even over `0.0..1.0`; the caller brings it, so that tests are repeatable.
    pub fn next(&mut self, random: f64) -> Duration {
        let wait = self.step.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0);
        self.step = (self.step * 2).min(self.ceiling);
        wait
    }

    /// After a success: the next wait starts at the floor again.
    pub fn reset(&mut self) {
        self.step = self.floor;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_the_ceiling_and_starts_again() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<_> = (0..6).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(backoff.next(0.0), Duration::from_millis(500));
        backoff.reset();
        assert_eq!(backoff.next(1.0), Duration::from_millis(100));
    }
}
