//! What was seen of the cluster, and what it says about the primary. Pure: time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::lsn::Lsn;
use crate::protocol::{Node, NodeStatus, Postmaster, Rejoin, Sample, Upstream};

/// Limits by which evidence is judged.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// An agent not heard for so long counts as silent; three heartbeats.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub agent_silence: Duration,
    /// A Postgres that has not answered our own query for so long counts as silent.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub probe_silence: Duration,
    /// A standby that has not heard its primary for so long is not a witness that the primary lives. Above half of
    /// Postgres' `wal_receiver_timeout`, which is when an idle receiver asks.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub stream_silence: Duration,
    /// A standby missing for so long is given up: commits no longer wait for it. Until then they do.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub degrade_after: Duration,
    /// A standby further behind than this is not waited for, and not a target of a switchover.
    pub max_lag_bytes: u64,
    /// A standby that has not streamed for so long is not helped by waiting.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub rejoin_after: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            agent_silence: Duration::from_millis(600),
            probe_silence: Duration::from_millis(600),
            stream_silence: Duration::from_millis(750),
            degrade_after: Duration::from_secs(3),
            max_lag_bytes: 16 << 20,
            rejoin_after: Duration::from_secs(10),
        }
    }
}

/// One node as seen by the orchestrator. Times are since its start.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub status: Option<NodeStatus>,
    /// When the agent last answered.
    pub heard: Option<Duration>,
    /// The last try found nobody listening.
    pub agent_refused: bool,
    /// When Postgres last answered our own query.
    pub probed: Option<Duration>,
    pub probe_refused: bool,
    /// Since when the primary's samples lack this standby.
    pub absent_since: Option<Duration>,
    /// An order of ours is under way.
    pub busy: bool,
    /// The way of rejoining that failed last.
    pub failed: Option<Rejoin>,
    /// No new order before.
    pub not_before: Duration,
}

/// Everything seen.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub nodes: BTreeMap<Node, Seen>,
}

/// What is known of the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Writable.
    Alive,
    /// Its agent says that the postmaster is not running.
    Gone,
    /// Nobody can reach it and nobody streams from it.
    Lost,
    /// Runs, but still or again as a standby.
    Standby,
    /// Neither proved alive nor dead. The reason, for the operator.
    Uncertain(String),
}

impl Seen {
    /// The agent answered lately: its status can be relied on.
    #[must_use]
    pub fn is_heard(&self, now: Duration, policy: &Policy) -> bool {
        !self.agent_refused && self.heard.is_some_and(|at| now.saturating_sub(at) < policy.agent_silence)
    }

    /// The status, if it can be relied on.
    #[must_use]
    pub fn fresh(&self, now: Duration, policy: &Policy) -> Option<&NodeStatus> {
        self.status.as_ref().filter(|_| self.is_heard(now, policy))
    }

    /// Postgres' own words, if they can be relied on.
    #[must_use]
    pub fn sample(&self, now: Duration, policy: &Policy) -> Option<&Sample> {
        let sample = self.fresh(now, policy)?.sample.as_ref()?;
        (self.age(now, sample) < policy.agent_silence * 2).then_some(sample)
    }

    fn age(&self, now: Duration, sample: &Sample) -> Duration {
        now.saturating_sub(self.heard.unwrap_or_default()) + Duration::from_millis(sample.age_ms)
    }

    /// This standby hears a primary.
    fn is_witness(&self, now: Duration, policy: &Policy) -> bool {
        self.sample(now, policy).is_some_and(|sample| {
            sample.receiver.as_ref().is_some_and(|receiver| {
                let silent = Duration::from_millis(receiver.silent_ms) + self.age(now, sample);
                receiver.streaming && silent < policy.stream_silence
            })
        })
    }

    /// A standby that could be promoted now.
    #[must_use]
    pub fn is_candidate(&self, now: Duration, policy: &Policy, system_id: &str) -> bool {
        self.fresh(now, policy).is_some_and(|status| status.is_standby() && status.system_id == system_id)
            && self.sample(now, policy).is_some()
    }

    /// The last position it is known to hold.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        let status = self.status.as_ref();
        let sample = status.and_then(|status| status.sample.as_ref()).map(|sample| sample.lsn);
        sample
            .or(status.and_then(|status| status.control.as_ref()).map(|control| control.checkpoint))
            .unwrap_or_default()
    }

    /// Streams from `upstream` now, by its own words.
    #[must_use]
    pub fn streams_from(&self, upstream: &Upstream) -> bool {
        let sample = self.status.as_ref().and_then(|status| status.sample.as_ref());
        sample.and_then(|sample| sample.receiver.as_ref()).is_some_and(|receiver| {
            receiver.streaming && receiver.port == upstream.port && receiver.host == upstream.host
        })
    }
}

impl View {
    #[must_use]
    pub fn node(&self, node: &str) -> Option<&Seen> {
        self.nodes.get(node)
    }

    /// Nothing was ever had from its agent, not even a refusal.
    #[must_use]
    pub fn is_unheard(&self, node: &str) -> bool {
        self.nodes.get(node).is_none_or(|seen| seen.heard.is_none() && !seen.agent_refused)
    }

    /// What is known of `primary`.
    ///
    /// Being told (the agent's word, refused connections) decides at once; silence only after the limits, and only
    /// while no standby hears the primary and somebody else is heard: else it is we who are cut off.
    #[must_use]
    pub fn condition(&self, primary: &str, now: Duration, policy: &Policy) -> Condition {
        let Some(seen) = self.nodes.get(primary) else {
            return Condition::Uncertain(format!("{primary} is not among the configured nodes"));
        };
        if let Some(status) = seen.fresh(now, policy) {
            match &status.postmaster {
                Postmaster::Stopped { .. } => return Condition::Gone,
                Postmaster::Starting => return Condition::Uncertain(format!("{primary} is starting")),
                Postmaster::Stopping => return Condition::Uncertain(format!("{primary} is stopping")),
                Postmaster::Rebuilding { .. } => {
                    return Condition::Uncertain(format!("{primary} is being rebuilt"));
                }
                Postmaster::Running => {}
            }
            match seen.sample(now, policy) {
                Some(sample) if sample.in_recovery => return Condition::Standby,
                Some(_) => return Condition::Alive,
                None => {}
            }
        }
        let answers = |at: Option<Duration>, limit| at.is_some_and(|at| now.saturating_sub(at) < limit);
        if seen.agent_refused || !answers(seen.heard, policy.agent_silence) || seen.status.is_none() {
            // Nothing to be had from its agent: weigh the rest.
        } else if answers(seen.probed, policy.probe_silence) {
            return Condition::Uncertain(format!("{primary} answers, but its agent cannot query it"));
        }
        if !seen.probe_refused && answers(seen.probed, policy.probe_silence) {
            return Condition::Uncertain(format!("{primary} answers, but its agent does not"));
        }
        let others = || self.nodes.iter().filter(|(node, _)| *node != primary);
        if let Some((witness, _)) = others().find(|(_, other)| other.is_witness(now, policy)) {
            return Condition::Uncertain(format!("{primary} does not answer, but {witness} streams from it"));
        }
        if !others().any(|(_, other)| other.is_heard(now, policy)) {
            return Condition::Uncertain("no node at all is heard: the orchestrator may be cut off".into());
        }
        Condition::Lost
    }

    /// Keeps account of since when each standby is missing at `primary`. To be called after each change.
    pub fn note_absence(&mut self, primary: &str, now: Duration, policy: &Policy) {
        let Some(sample) = self.nodes.get(primary).and_then(|seen| seen.sample(now, policy)).cloned() else {
            // The primary says nothing: nobody can be blamed for missing.
            self.nodes.values_mut().for_each(|seen| seen.absent_since = None);
            return;
        };
        for (node, seen) in &mut self.nodes {
            let attached = sample.standbys.iter().any(|standby| standby.node == *node && standby.streaming);
            seen.absent_since =
                if attached || node == primary { None } else { seen.absent_since.or(Some(now)) };
        }
    }

    /// The highest timeline that anybody is known to be on, or that the primary must be on.
    #[must_use]
    pub fn timeline(&self, above: u32) -> u32 {
        let statuses = self.nodes.values().filter_map(|seen| seen.status.as_ref());
        statuses.map(NodeStatus::timeline).max().unwrap_or(0).max(above + 1)
    }

    /// Members of `set` that could be promoted now, the one with the most WAL first.
    #[must_use]
    pub fn candidates<'a>(
        &'a self,
        set: impl IntoIterator<Item = &'a Node>,
        system_id: &str,
        now: Duration,
        policy: &Policy,
    ) -> Vec<&'a Node> {
        let mut candidates: Vec<_> = set
            .into_iter()
            .filter_map(|node| {
                self.nodes
                    .get(node)
                    .filter(|seen| seen.is_candidate(now, policy, system_id))
                    .map(|seen| (seen.lsn(), node))
            })
            .collect();
        candidates.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
        candidates.into_iter().map(|(_, node)| node).collect()
    }
}
