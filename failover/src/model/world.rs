//! The world of the model: two machines, what happens to them, and what an agent does with an order.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use failover_api::Copies;
use jiff::Timestamp;

use crate::protocol::{Order, Rejoin};
use crate::state::State;

/// Violations that are seen in the moment of an act, as bits.
pub(super) const TWO_ACKNOWLEDGE: u8 = 1;
pub(super) const LEADER_LACKS: u8 = 2;
pub(super) const REWRITTEN: u8 = 4;
pub(super) const MIXED: u8 = 8;
pub(super) const OLD_STATE: u8 = 16;
pub(super) const NOT_IN_SYNC: u8 = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Link {
    Up,
    /// The orchestrator does not reach it. It runs, and so does replication.
    Cut,
    /// The machine is off.
    Off,
}

/// What the commits of a node wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Wait {
    Nobody,
    Partner,
    /// A name that nobody bears.
    Guard,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Member {
    pub(super) link: Link,
    pub(super) running: bool,
    pub(super) standby: bool,
    /// Its last stop was orderly.
    pub(super) clean: bool,
    /// An operator has started it beside its agent.
    pub(super) foreign: bool,
    /// It is configured to stream from the other node.
    pub(super) follows: bool,
    pub(super) wait: Wait,
    pub(super) timeline: u8,
    /// Numbers of the commits it has, in order.
    pub(super) log: Vec<u8>,
    /// So many of the last of them have a client that waits for the answer.
    pub(super) waiting: u8,
    /// Its agent knows that so many were acknowledged.
    pub(super) told: u8,
    pub(super) guarded: bool,
    pub(super) estranged: bool,
    pub(super) touched: bool,
    pub(super) alone: bool,
    /// An operator made it acknowledge, or may have: what it acknowledges is no promise of ours.
    pub(super) opened: bool,
    pub(super) epoch: u8,
    /// It has had an order. There is one orchestrator.
    pub(super) obeys: bool,
}

/// The orchestrator's file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Durable(pub(super) Arc<State>);

impl Durable {
    /// Without what depends on the clock or is for people only, so that the same state is the same.
    pub(super) fn of(state: &State) -> Self {
        let mut state = state.clone();
        for kept in state.kept.values_mut() {
            kept.since = Timestamp::UNIX_EPOCH;
            kept.reason.clear();
        }
        if let Some(operation) = &mut state.operation {
            operation.write_gap_ms = None;
            operation.reason.clear();
            for step in &mut operation.steps {
                (step.started_at, step.duration_ms) = (None, 0.0);
                step.detail.clear();
            }
        }
        Self(Arc::new(state))
    }
}

impl Eq for Durable {}

impl Hash for Durable {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let state = &*self.0;
        (state.epoch, &state.primary, &state.sync_set, &state.wait_for, state.above).hash(hasher);
        state.kept.keys().for_each(|node| node.hash(hasher));
        // Rarely there.
        state.operation.as_ref().map(|operation| serde_json::to_string(operation).unwrap()).hash(hasher);
    }
}

/// An order that is still on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Late {
    pub(super) node: usize,
    pub(super) epoch: u64,
    pub(super) order: Order,
}

impl Hash for Late {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        (self.node, self.epoch, serde_json::to_string(&self.order).unwrap()).hash(hasher);
    }
}

/// What a node's agent says: the node, how much its standby has if one streams from it, and whether it streams itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Glance {
    pub(super) member: Member,
    pub(super) standby: Option<u8>,
    pub(super) streams: bool,
}

/// What the orchestrator knows and would forget with a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Memory {
    /// The last that was heard of a node that is not heard any more.
    pub(super) last: [Option<Glance>; 2],
    pub(super) cures: [Option<Cure>; 2],
    pub(super) failed_fences: u8,
}

/// [`Rejoin`], which cannot be hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cure {
    Rewind,
    Clone,
}

impl Cure {
    pub(super) fn of(how: Rejoin) -> Self {
        if how == Rejoin::Clone { Self::Clone } else { Self::Rewind }
    }

    pub(super) fn how(self) -> Rejoin {
        if self == Self::Clone { Rejoin::Clone } else { Rejoin::Rewind }
    }
}

/// What may still happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    pub(super) commits: u8,
    /// Crashes, machines that go off, cut roads.
    pub(super) breaks: u8,
    /// Orders that are lost or late, and ends of the orchestrator.
    pub(super) mishaps: u8,
    /// Of an operator.
    pub(super) acts: u8,
    pub(super) restores: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) nodes: [Member; 2],
    /// Replication between the two works.
    pub(super) road: bool,
    pub(super) saved: Durable,
    pub(super) backup: Option<Durable>,
    pub(super) late: Option<Late>,
    pub(super) memory: Memory,
    /// Commits that somebody was told of, as bits by number.
    pub(super) acknowledged: u8,
    /// Those of them that whoever leads must have.
    pub(super) promised: u8,
    /// What is written down is older than what once was.
    pub(super) restored: bool,
    /// The orchestrator has acted on that, while nobody was heard who had obeyed what came later.
    pub(super) blind: bool,
    pub(super) left: Budget,
    pub(super) wrong: u8,
}

pub(super) fn bits(log: &[u8]) -> u8 {
    log.iter().fold(0, |bits, commit| bits | 1 << commit)
}

impl World {
    pub(super) fn new(copies: Copies, left: Budget) -> Self {
        let member = |standby| Member {
            link: Link::Up,
            running: true,
            standby,
            clean: false,
            foreign: false,
            follows: standby,
            wait: if standby { Wait::Guard } else { Wait::Nobody },
            timeline: 1,
            log: Vec::new(),
            waiting: 0,
            told: 0,
            guarded: false,
            estranged: false,
            touched: false,
            alone: false,
            opened: false,
            epoch: 0,
            obeys: false,
        };
        let waits = if copies == Copies::TwoCopies { ["b".to_owned()].into() } else { [].into() };
        let state = State::first("a".into(), "s".into(), waits);
        Self {
            nodes: [member(false), member(true)],
            road: true,
            saved: Durable::of(&State { id: "o".into(), ..state }),
            backup: None,
            late: None,
            memory: Memory::default(),
            acknowledged: 0,
            promised: 0,
            restored: false,
            blind: false,
            left,
            wrong: 0,
        }
    }

    /// It streams from the other one, or would if there were anything new.
    pub(super) fn attached(&self, standby: usize) -> bool {
        let (s, p) = (&self.nodes[standby], &self.nodes[1 - standby]);
        let able = self.road && s.running && s.standby && s.follows && p.running;
        able && s.timeline <= p.timeline && p.log.starts_with(&s.log)
    }

    pub(super) fn glance(&self, node: usize) -> Glance {
        let standby = self.attached(1 - node).then(|| self.nodes[1 - node].log.len() as u8);
        Glance { member: self.nodes[node].clone(), standby, streams: self.attached(node) }
    }

    pub(super) fn stream(&mut self, standby: usize) {
        if self.attached(standby) {
            self.nodes[standby].log = self.nodes[1 - standby].log.clone();
            self.nodes[standby].timeline = self.nodes[1 - standby].timeline;
        }
    }

    pub(super) fn can_acknowledge(&self, node: usize) -> bool {
        let member = &self.nodes[node];
        let heard = match member.wait {
            Wait::Nobody => true,
            Wait::Partner => self.attached(1 - node),
            Wait::Guard => false,
        };
        member.running && !member.standby && heard
    }

    /// Clients whose commits need wait no longer are told so, and what must hold at every moment is looked at.
    pub(super) fn settle(&mut self) {
        for node in 0..2 {
            let member = &self.nodes[node];
            let has = match member.wait {
                Wait::Nobody => member.log.len(),
                Wait::Partner if self.attached(1 - node) => self.nodes[1 - node].log.len(),
                _ => 0,
            };
            if member.waiting == 0 || has < member.log.len() || !member.running || member.standby {
                continue;
            }
            let first = member.log.len() - usize::from(member.waiting);
            let told = bits(&member.log[first..]);
            self.acknowledged |= told;
            self.promised |= if member.opened { 0 } else { told };
            let member = &mut self.nodes[node];
            // The agent's own last commit came before theirs.
            (member.waiting, member.told) = (0, first as u8);
        }
        let ours = |node: &usize| self.can_acknowledge(*node) && !self.nodes[*node].opened;
        let able: Vec<usize> = (0..2).filter(ours).collect();
        if self.blind {
            return;
        }
        if able.len() > 1 {
            self.wrong |= TWO_ACKNOWLEDGE;
        }
        if able.iter().any(|node| self.promised & !bits(&self.nodes[*node].log) != 0) {
            self.wrong |= LEADER_LACKS;
        }
    }

    pub(super) fn stop(&mut self, node: usize, clean: bool) {
        let member = &mut self.nodes[node];
        if member.running {
            (member.running, member.clean, member.foreign) = (false, clean, false);
            (member.guarded, member.waiting) = (false, 0);
        }
    }

    /// Nothing differs but the epochs: a try that failed and will fail again.
    pub(super) fn is_repeated_by(&self, next: &Self) -> bool {
        let mut next = next.clone();
        for (node, before) in next.nodes.iter_mut().zip(&self.nodes) {
            node.epoch = before.epoch;
        }
        next.saved = Durable(Arc::new(State { epoch: self.saved.0.epoch, ..(*next.saved.0).clone() }));
        *self == next
    }

    /// The orchestrator's process is another one.
    pub(super) fn forget(&mut self) {
        self.memory = Memory::default();
    }

    /// Everything that a person can mend outside of the cluster is mended, nothing is on its way and nothing more will happen.
    pub(super) fn mend(&mut self) {
        (self.road, self.late, self.backup) = (true, None, None);
        self.left = Budget { commits: 0, breaks: 0, mishaps: 0, acts: 0, restores: 0 };
        // Who was told what counts no more.
        (self.acknowledged, self.promised, self.blind) = (0, 0, true);
        for node in 0..2 {
            if self.nodes[node].foreign {
                self.stop(node, true);
            }
            self.come_back(node);
        }
        self.settle();
    }

    /// Two copies, and commits wait for the second.
    pub(super) fn is_whole(&self) -> bool {
        let state = &self.saved.0;
        let primary = usize::from(state.primary == "b");
        let waits = self.nodes[primary].wait == Wait::Partner;
        waits && self.can_acknowledge(primary) && state.sync_set.len() == 1 && state.operation.is_none()
    }
}
