//! Looks at the run once a second: gauges, readiness, and a word in the log when something is not as it should be.
//!
//! Speaks for all connections together: 20,000 of them losing one broker are one line.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use service::health::Dependency;
use tokio_util::sync::CancellationToken;

use super::shared::{Publishers, Shared};

const EVERY: Duration = Duration::from_secs(1);
/// The same thing is said again after this many looks.
const PATIENCE: u32 = 10;
/// Being behind by less is a hiccup of the machine.
const BEHIND: Duration = Duration::from_secs(1);

/// Something to say at once, and then not again for a while.
#[derive(Debug, Default)]
struct Topic {
    said: Option<u32>,
    /// The count it was about when it was last said.
    count: u64,
}

impl Topic {
    /// How much `count` has grown since it was last said, if it has and if it is time to say so.
    fn news(&mut self, look: u32, count: u64) -> Option<u64> {
        let grown = count.saturating_sub(self.count);
        if grown == 0 || self.said.is_some_and(|said| look - said < PATIENCE) {
            return None;
        }
        self.said = Some(look);
        self.count = count;
        Some(grown)
    }
}

/// Watches until the shutdown.
///
/// # Errors
/// None; it is a task of a process.
pub async fn run(
    shared: Arc<Shared>,
    publishers: Publishers,
    broker: Dependency,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut refused, mut late, mut progress) = (Topic::default(), Topic::default(), Topic::default());
    let (mut up_before, mut late_looks) = (0, 0);
    for look in 0.. {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => break,
        }
        let (behind, refusals) = survey(&shared, &publishers);
        shared.metrics.behind_seconds.set(behind.as_secs_f64());
        let up = shared.up();
        connections(&shared, &broker, up, up_before, look);
        up_before = up;
        if let Some(refused) = refused.news(look, refusals.values().sum()) {
            tracing::error!(
                refused,
                since_start = ?refusals,
                "the broker does not accept messages: their readings are lost (no_matching_subscribers: nobody \
                 subscribes to them)"
            );
        }
        late_looks += u64::from(behind > BEHIND);
        let skipped = shared.metrics.skipped.get();
        if late.news(look, late_looks + skipped).is_some() {
            tracing::warn!(
                behind = format!("{behind:.1?}"),
                skipped,
                "behind schedule: the broker or this machine does not keep up"
            );
        }
        if let Some(sent) = progress.news(look, shared.metrics.sent.get()) {
            let acknowledged = shared.metrics.acknowledged.get();
            tracing::info!(sent, acknowledged, in_flight = shared.metrics.in_flight.get(), "publishing");
        }
    }
    Ok(())
}

fn connections(shared: &Shared, broker: &Dependency, up: u32, before: u32, look: u32) {
    let all = shared.settings.device_simulator.connections;
    if up == all {
        broker.up();
        if before < all {
            tracing::info!(connections = up, "all connections are up");
        }
        return;
    }
    let problem = shared.take_problem();
    let reason = problem.clone().unwrap_or_else(|| "connecting".into());
    broker.down(format!("{up} of {all} connections are up: {reason}"));
    if problem.is_some() && (up < before || look.is_multiple_of(PATIENCE)) {
        tracing::warn!(up, of = all, problem = reason, "not all connections are up; trying again");
    }
}

/// The worst delay of any connection, and all refusals by reason.
fn survey(shared: &Shared, publishers: &Publishers) -> (Duration, BTreeMap<&'static str, u64>) {
    let now = shared.now().since;
    let mut refusals = BTreeMap::new();
    let mut behind = Duration::ZERO;
    for publisher in publishers.iter() {
        let publisher = publisher.lock().unwrap_or_else(PoisonError::into_inner);
        behind = behind.max(publisher.behind(now));
        for (reason, count) in &publisher.traffic().refused {
            *refusals.entry(*reason).or_insert(0) += count;
        }
    }
    (behind, refusals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_told_at_once_and_then_not_for_a_while() {
        let mut topic = Topic::default();
        assert_eq!(topic.news(3, 0), None);
        assert_eq!(topic.news(4, 7), Some(7));
        assert_eq!(topic.news(5, 9), None);
        assert_eq!(topic.news(14, 9), Some(2));
        assert_eq!(topic.news(99, 9), None);
    }
}
