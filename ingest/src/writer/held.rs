//! A batch that waits for its tables to be mended.

use std::time::Duration;

use prometheus::IntGauge;
use tokio::time::Instant;

/// Between two lines of the log that say that a batch is held. The batch itself is offered as often whatever the tables say to
/// other rows: those are not what is in it, and a wrong answer must not hold it for ever.
const PERIOD: Duration = Duration::from_secs(30);

/// Counted for as long as it waits.
#[derive(Debug)]
pub(super) struct Held {
    gauge: IntGauge,
    said: Instant,
    offered: Instant,
    /// The tables are asked before it is offered again: one batch after the other would only keep the server busy.
    refused: bool,
}

impl Held {
    pub(super) fn new(gauge: &IntGauge, reason: &str, rows: usize) -> Self {
        gauge.inc();
        say(reason, rows);
        let now = Instant::now();
        Self { gauge: gauge.clone(), said: now, offered: now, refused: true }
    }

    /// Refused once more.
    pub(super) fn refuse(&mut self, reason: &str, rows: usize) {
        self.refused = true;
        if self.said.elapsed() > PERIOD {
            self.said = Instant::now();
            say(reason, rows);
        }
    }

    pub(super) fn is_refused(&self) -> bool {
        self.refused
    }

    /// The batch is offered next.
    pub(super) fn offer(&mut self) {
        self.refused = false;
        self.offered = Instant::now();
    }

    /// Whether it is to be offered although nobody says that it would be taken; it is then.
    pub(super) fn is_due(&mut self) -> bool {
        let is_due = self.refused && self.offered.elapsed() > PERIOD;
        if is_due {
            self.offer();
        }
        is_due
    }
}

fn say(reason: &str, rows: usize) {
    tracing::error!(
        error = reason,
        rows,
        "the tables refuse what they took before; nothing is acknowledged until they take it again"
    );
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_offered_now_and_then_whatever_the_tables_say() {
        let gauge = IntGauge::new("held", "held").unwrap();
        let mut held = Held::new(&gauge, "changed", 1);
        assert!(held.is_refused() && !held.is_due());
        tokio::time::advance(PERIOD + Duration::from_secs(1)).await;
        assert!(held.is_due() && !held.is_refused() && !held.is_due());
        held.refuse("changed", 1);
        assert!(held.is_refused() && !held.is_due());
        assert_eq!(gauge.get(), 1);
        drop(held);
        assert_eq!(gauge.get(), 0);
    }
}
