//! Looks at the run once a second: gauges, readiness, and a word in the log when something is not as it should be.
//!
//! Speaks for all connections together: 20,000 of them losing one broker are one line.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use service::health::Dependency;
use tokio_util::sync::CancellationToken;

use super::run::{Publishers, Shared};

const EVERY: Duration = Duration::from_secs(1);
/// The same complaint is made again after this many looks.
const PATIENCE: u32 = 10;
/// Being behind by less is a hiccup of the machine.
const BEHIND: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    up: u32,
    sent: u64,
    acknowledged: u64,
    skipped: u64,
    refused: u64,
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
    let (mut last, mut spoken) = (Seen::default(), Seen::default());
    let mut looks = 0_u32;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let (behind, refusals) = look(&shared, &publishers);
        shared.metrics.behind_seconds.set(behind.as_secs_f64());
        let seen = Seen {
            up: shared.up(),
            sent: shared.metrics.sent.get(),
            acknowledged: shared.metrics.acknowledged.get(),
            skipped: shared.metrics.skipped.get(),
            refused: refusals.iter().map(|(_, count)| count).sum(),
        };
        connections(&shared, &broker, seen.up, last.up, looks);
        let first_refusal = seen.refused > 0 && spoken.refused == 0;
        if looks.is_multiple_of(PATIENCE) || first_refusal {
            if seen.refused > spoken.refused {
                tracing::error!(
                    refused = seen.refused - spoken.refused,
                    since_start = ?refusals,
                    "the broker does not accept messages: their readings are lost (no_matching_subscribers: \
                     nobody subscribes to them)"
                );
            }
            if behind > BEHIND || seen.skipped > spoken.skipped {
                tracing::warn!(
                    behind = format!("{behind:.1?}"),
                    skipped = seen.skipped - spoken.skipped,
                    "behind schedule: the broker or this machine does not keep up"
                );
            }
            if seen.sent > spoken.sent {
                tracing::info!(
                    sent = seen.sent,
                    acknowledged = seen.acknowledged,
                    in_flight = shared.metrics.in_flight.get(),
                    "publishing"
                );
            }
            spoken = seen;
        }
        last = seen;
        looks += 1;
    }
}

fn connections(shared: &Shared, broker: &Dependency, up: u32, before: u32, looks: u32) {
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
    if problem.is_some() && (up < before || looks.is_multiple_of(PATIENCE)) {
        tracing::warn!(up, of = all, problem = reason, "not all connections are up; trying again");
    }
}

/// The worst delay of any connection, and all refusals by reason.
fn look(shared: &Shared, publishers: &Publishers) -> (Duration, Vec<(&'static str, u64)>) {
    let now = shared.now().since;
    let mut refusals = std::collections::BTreeMap::new();
    let mut behind = Duration::ZERO;
    for publisher in publishers.iter() {
        let publisher = publisher.lock().unwrap_or_else(PoisonError::into_inner);
        behind = behind.max(publisher.behind(now));
        for (reason, count) in &publisher.traffic().refused {
            *refusals.entry(*reason).or_insert(0) += count;
        }
    }
    (behind, refusals.into_iter().collect())
}
