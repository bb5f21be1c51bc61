//! What was seen of the cluster, and what it says about the primary. Pure: time is an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use failover_api::{Lsn, Node};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::protocol::{Attached, NodeStatus, Postmaster, Rejoin, Sample, Upstream};
use crate::state::State;

/// Time and size limits for decisions.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// An agent that has not answered for this long counts as silent; three heartbeats.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub agent_silence: Duration,
    /// A Postgres that has not answered the orchestrator's probe for this long counts as silent.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub probe_silence: Duration,
    /// A standby that has not heard its primary for this long does not count as evidence that the primary is
    /// alive. Must be above half of Postgres' `wal_receiver_timeout`: after that time an idle receiver asks for a
    /// reply.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub stream_silence: Duration,
    /// A standby that is missing for this long is removed: commits no longer wait for it. Until then they do.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub degrade_after: Duration,
    /// Commits do not wait for a standby that is further behind than this, and it is not a target of a
    /// switchover.
    pub max_lag_bytes: u64,
    /// A primary that commits nothing for this long, although its standbys have everything it has written, is
    /// replaced. Its disk probably hangs.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub stall_after: Duration,
    /// A standby that has not streamed for this long is rewound or cloned.
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
            stall_after: Duration::from_secs(10),
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
    /// What cures the failure of the last order to rejoin, if rewriting the data does.
    pub cure: Option<Rejoin>,
    /// Why the last order failed, while none has succeeded since, and how many have failed.
    pub trouble: Option<String>,
    pub tries: u32,
    /// How long it was missing of late: time that it is there pays for a quarter.
    pub absent_for: Duration,
    /// When it was last seen to go missing, the newest last.
    pub drops: Vec<Duration>,
    /// Since when it is there without interruption.
    pub present_since: Option<Duration>,
    /// The agent's count of its own commits, and since when it has not grown.
    pub beat: (u64, Duration),
    /// Since when its disk has been full.
    pub full_since: Option<Duration>,
    /// No new order before.
    pub not_before: Duration,
}

/// Everything seen.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub nodes: BTreeMap<Node, Seen>,
    /// When [`View::note`] was last called.
    pub noted: Duration,
    /// Fences that failed, one after another, while the primary was gone.
    pub failed_fences: u32,
}

/// A reason to think that what we have written down is older than the facts. While there is one, nothing is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubt {
    /// An agent has obeyed a higher epoch than ours.
    Epoch { node: Node, epoch: u64 },
    /// An agent obeys another orchestrator.
    Orchestrator { node: Node, id: String },
    /// A node is on a timeline above the primary's: somebody has promoted it. `harmless`: by its agent's word it has
    /// acknowledged nothing since.
    Timeline { node: Node, timeline: u32, leader: u32, harmless: bool },
}

impl std::fmt::Display for Doubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Epoch { node, epoch } => write!(f, "{node} has obeyed epoch {epoch}, which is above ours"),
            Self::Orchestrator { node, id } => write!(f, "{node} obeys orchestrator {id}, not this one"),
            Self::Timeline { node, timeline, leader, harmless } => {
                let acknowledged = if *harmless { "; it has acknowledged nothing since" } else { "" };
                write!(
                    f,
                    "{node} is on timeline {timeline}, above the primary's {leader}: somebody has promoted it{acknowledged}"
                )
            }
        }
    }
}

/// A primary whose own commits take longer waits for somebody,
const HANGS: Duration = Duration::from_secs(1);
/// and one that has nobody left to wait for does not work.
pub const STALLED: Duration = Duration::from_secs(2);
/// Three times within this time missing is too often.
const FLAPS: Duration = Duration::from_secs(60);
/// One that was, is waited for again when it has been there for so long.
const STEADY: Duration = Duration::from_secs(10);

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
    /// It comes and goes: it is waited for again only when it has been there for a while.
    #[must_use]
    pub fn is_unsteady(&self, now: Duration) -> bool {
        let flaps = self.drops.len() >= 3 && self.drops.iter().all(|at| now.saturating_sub(*at) < FLAPS);
        flaps && self.present_since.is_none_or(|since| now.saturating_sub(since) < STEADY)
    }

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
            if let Some(pid) = status.foreign {
                return Condition::Uncertain(format!(
                    "a postmaster (process {pid}) that its agent has not started runs on the data of {primary}"
                ));
            }
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

    /// Keeps account of how long each standby is missing at `primary`, and how long that commits nothing. To be called after
    /// each change.
    pub fn note(&mut self, primary: &str, now: Duration, policy: &Policy) {
        let passed = now.saturating_sub(self.noted);
        self.noted = now;
        for seen in self.nodes.values_mut() {
            let beat = seen.status.as_ref().map_or(0, |status| status.beat);
            let works = seen.status.as_ref().is_none_or(|status| !status.pending || !status.is_writable());
            if beat != seen.beat.0 || works || !seen.is_heard(now, policy) {
                seen.beat = (beat, now);
            }
            let full = seen.fresh(now, policy).is_some_and(|status| status.full);
            seen.full_since = full.then(|| seen.full_since.unwrap_or(now));
        }
        let leader = self.nodes.get(primary);
        let Some(sample) = leader.and_then(|seen| seen.sample(now, policy)).cloned() else {
            // The primary says nothing: nobody can be blamed for missing.
            self.nodes.values_mut().for_each(|seen| seen.absent_since = None);
            return;
        };
        let hangs = leader.is_some_and(|seen| now.saturating_sub(seen.beat.1) > HANGS);
        for (node, seen) in &mut self.nodes {
            // One that does not get on is as good as missing. When it has all there is, it is the primary that hangs.
            let serves = |standby: &Attached| {
                standby.node == *node && standby.is_genuine() && !(hangs && standby.flushed < sample.lsn)
            };
            if node == primary || sample.standbys.iter().any(serves) {
                seen.present_since = seen.present_since.or(Some(now));
                seen.absent_since = None;
                seen.absent_for = seen.absent_for.saturating_sub(passed / 4);
                continue;
            }
            if seen.present_since.take().is_some() {
                seen.drops.push(now);
                let many = seen.drops.len().saturating_sub(3);
                seen.drops.drain(..many);
            }
            if seen.absent_since.is_some() {
                seen.absent_for = (seen.absent_for + passed).min(policy.degrade_after * 2);
            }
            seen.absent_since = seen.absent_since.or(Some(now));
        }
    }

    /// How long the primary has committed nothing although whoever it waits for has all that it has written.
    #[must_use]
    pub fn stalled(
        &self,
        primary: &str,
        wait_for: &BTreeSet<Node>,
        now: Duration,
        policy: &Policy,
    ) -> Option<Duration> {
        let seen = self.nodes.get(primary)?;
        let sample = seen.sample(now, policy).filter(|sample| !sample.in_recovery)?;
        let has_all = |node: &Node| {
            sample
                .standbys
                .iter()
                .any(|standby| standby.node == *node && standby.is_genuine() && standby.flushed >= sample.lsn)
        };
        let stalled = now.saturating_sub(seen.beat.1);
        (stalled > STALLED && !wait_for.is_empty() && wait_for.iter().all(has_all)).then_some(stalled)
    }

    /// How long `node` has had a full disk, when it is not for a moment. A primary may still commit what fits into the pages that
    /// it has, a marker for one.
    #[must_use]
    pub fn full(&self, node: &str, now: Duration) -> Option<Duration> {
        let since = self.nodes.get(node)?.full_since?;
        Some(now.saturating_sub(since)).filter(|full| *full > STALLED)
    }

    /// Why what is written down may be older than the facts.
    #[must_use]
    pub fn doubts(&self, state: &State, now: Duration, policy: &Policy) -> Vec<Doubt> {
        let leader = self.nodes.get(&state.primary).and_then(|seen| seen.status.as_ref());
        let leader = leader.map_or(0, NodeStatus::timeline).max(state.above + 1);
        let mut doubts = Vec::new();
        for (node, seen) in &self.nodes {
            // What was once said stays true, also of one that is not heard any more.
            let Some(status) = &seen.status else { continue };
            if status.epoch > state.epoch {
                doubts.push(Doubt::Epoch { node: node.clone(), epoch: status.epoch });
            }
            let obeys = &status.orchestrator;
            if !obeys.is_empty() && *obeys != state.id && !state.displaced.contains(obeys) {
                doubts.push(Doubt::Orchestrator { node: node.clone(), id: obeys.clone() });
            }
            let (timeline, same) = (status.timeline(), status.system_id == state.system_id);
            if *node != state.primary && same && timeline > leader {
                let harmless = seen.is_heard(now, policy) && status.guarded && status.is_writable();
                doubts.push(Doubt::Timeline { node: node.clone(), timeline, leader, harmless });
            }
        }
        doubts
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
