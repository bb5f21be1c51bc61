//! Compares once a second where the Redis master is with the region of the primary of record, and moves it while they
//! differ. The step of a failover does the same at once; this finishes what it could not, and what nobody asked for.
//!
//! While paused nothing is moved, and between the begin of an operation and its decision neither: who is primary is open.

use std::sync::Arc;
use std::time::Duration;

use failover_api::{Mode, Node, RedisReport};
use prometheus::IntGauge;
use service::backoff::Backoff;
use tokio::sync::watch as channel;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::alarms::{Facts, alarms};
use super::sight::Sight;
use super::{Moved, Redis};
use crate::orchestrator::remote::Remote;
use crate::state::State;

/// Between two looks; also how long a failover's own step has to begin before a difference is acted on.
const WATCH: Duration = Duration::from_secs(1);
/// Between two moves that failed: from the first to the second.
const PAUSE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// What the task is given.
#[derive(Debug)]
pub struct Keeper {
    pub redis: Redis,
    pub remote: Arc<Remote>,
    pub seen: channel::Sender<RedisReport>,
    /// 1 while most Sentinels agree on a master.
    pub known: IntGauge,
    /// 1 while that is in the region of the primary and says so itself.
    pub follows: IntGauge,
}

/// What the last looks and moves left behind.
#[derive(Debug)]
struct Memory {
    elsewhere: Option<Instant>,
    two_masters: Option<Instant>,
    failure: Option<String>,
    pause: Backoff,
    not_before: Instant,
}

impl Keeper {
    /// Runs until the token is cancelled.
    pub async fn run(self, shutdown: CancellationToken) {
        let [floor, ceiling] = PAUSE;
        let mut memory = Memory {
            elsewhere: None,
            two_masters: None,
            failure: None,
            pause: Backoff::new(floor, ceiling),
            not_before: Instant::now(),
        };
        let mut moving: JoinSet<anyhow::Result<Moved>> = JoinSet::new();
        loop {
            let sight = self.redis.look().await;
            let (state, now) = (self.remote.state(), Instant::now());
            let report = memory.note(&sight, state.as_ref(), &self.redis.master, now);
            self.known.set(i64::from(report.master.is_some()));
            self.follows.set(i64::from(report.follows));
            self.seen.send_replace(report);
            if moving.is_empty()
                && let Some(region) = memory.due(state.as_ref(), now)
            {
                tracing::warn!(region, "Redis is not in the region of the primary: moving it");
                let redis = self.redis.clone();
                moving.spawn(async move { redis.follow(&region).await });
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(moved) = moving.join_next() => memory.moved(moved.map_err(anyhow::Error::from).flatten()),
                () = tokio::time::sleep(WATCH) => {}
            }
        }
    }
}

impl Memory {
    fn note(&mut self, sight: &Sight, state: Option<&State>, master: &str, now: Instant) -> RedisReport {
        let mut report = sight.report();
        self.two_masters = sight.has_two_masters().then(|| self.two_masters.unwrap_or(now));
        // Before the first start is through nobody knows where it should be.
        let Some(state) = state else { return report };
        report.follows = sight.follows(&state.primary);
        if report.follows {
            self.elsewhere = None;
            self.failure = None;
            self.pause.reset();
            self.not_before = now;
        } else {
            self.elsewhere = Some(self.elsewhere.unwrap_or(now));
        }
        report.alarms = alarms(
            sight,
            &Facts {
                wanted: &state.primary,
                paused: state.mode == Mode::Paused,
                master,
                elsewhere: self.elsewhere.map(|since| now - since),
                two_masters: self.two_masters.map(|since| now - since),
                failure: self.failure.as_deref(),
            },
        );
        report
    }

    /// The region to move the master to now.
    fn due(&self, state: Option<&State>, now: Instant) -> Option<Node> {
        let state = state.filter(|state| state.mode == Mode::Auto)?;
        let undecided = state.operation.as_ref().is_some_and(|operation| !operation.is_decided());
        let stands = self.elsewhere.is_some_and(|since| now - since >= WATCH);
        (stands && !undecided && now >= self.not_before).then(|| state.primary.clone())
    }

    fn moved(&mut self, outcome: anyhow::Result<Moved>) {
        match outcome {
            Ok(moved) => {
                tracing::info!(?moved, "Redis was moved");
                self.failure = None;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "Redis was not moved");
                self.failure = Some(error);
            }
        }
        // Also after a success that the next look does not confirm.
        self.not_before = Instant::now() + self.pause.next(rand::random());
    }
}

#[cfg(test)]
mod tests {
    use super::super::sight::Role;
    use super::super::sight::tests::{REPLICA, sight};
    use super::*;

    fn memory() -> Memory {
        let [floor, ceiling] = PAUSE;
        Memory {
            elsewhere: None,
            two_masters: None,
            failure: None,
            pause: Backoff::new(floor, ceiling),
            not_before: Instant::now(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn moves_what_stays_elsewhere_and_waits_longer_after_each_failure() {
        let mut state = State::first("region2".into(), "s".into(), Default::default());
        let elsewhere = sight(&[1, 1, 1], &[Ok(Role::Master), REPLICA]);
        let mut memory = memory();
        let start = Instant::now();
        assert!(!memory.note(&elsewhere, Some(&state), "tier0", start).follows);
        assert_eq!(memory.due(Some(&state), start), None, "the step of a failover comes first");
        let later = start + WATCH;
        memory.note(&elsewhere, Some(&state), "tier0", later);
        assert_eq!(memory.due(Some(&state), later).as_deref(), Some("region2"));
        assert_eq!(memory.due(None, later), None);
        state.mode = Mode::Paused;
        assert_eq!(memory.due(Some(&state), later), None);
        state.mode = Mode::Auto;

        let mut waits = Vec::new();
        for _ in 0..6 {
            memory.moved(Err(anyhow::anyhow!("NOGOODSLAVE")));
            let wait = memory.not_before - Instant::now();
            assert_eq!(memory.due(Some(&state), Instant::now()), None);
            waits.push(wait);
            tokio::time::advance(wait.max(WATCH)).await;
            assert!(memory.due(Some(&state), Instant::now()).is_some(), "for as long as it takes");
        }
        assert!(waits.iter().all(|wait| *wait <= PAUSE[1]), "{waits:?}");
        assert!(waits.last().unwrap() > &(PAUSE[1] / 3), "{waits:?}");
        let report = memory.note(&elsewhere, Some(&state), "tier0", Instant::now());
        assert!(report.alarms.concat().contains("NOGOODSLAVE"), "{report:?}");

        let there = sight(&[2, 2, 1], &[REPLICA, Ok(Role::Master)]);
        let report = memory.note(&there, Some(&state), "tier0", Instant::now());
        assert!(report.follows && report.alarms.is_empty(), "{report:?}");
        assert_eq!(memory.due(Some(&state), Instant::now() + WATCH), None);
        assert_eq!(memory.failure, None);
    }
}
