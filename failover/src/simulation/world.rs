//! The machines of the simulation: what an agent and a Postgres would do, and what can happen to them.

mod hand;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use failover_api::{Lsn, Node};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::agent::conf::GUARD;
use crate::node_control::OrderError;
use crate::protocol::{
    Attached, Code, Command, Control, NodeStatus, Order, Postmaster, Receiver, Rejoin, Sample, Stop, Upstream,
};
use crate::state::State;
use crate::view::{Seen, View};

#[derive(Debug, Clone)]
pub(super) struct Machine {
    /// Whether the orchestrator reaches it.
    pub(super) reachable: bool,
    pub(super) frozen: bool,
    pub(super) powered: bool,
    pub(super) running: bool,
    pub(super) standby: bool,
    pub(super) clean: bool,
    pub(super) upstream: Option<u16>,
    pub(super) wait_for: BTreeSet<Node>,
    pub(super) timeline: u32,
    pub(super) epoch: u64,
    /// Numbers of the commits it has, in order.
    pub(super) log: Vec<u32>,
    pub(super) marker: u64,
    /// Its disk is there, with what was written on it.
    pub(super) data: bool,
    pub(super) estranged: bool,
    /// The orchestrator that it obeys.
    pub(super) obeys: String,
    /// An operator has started it beside its agent.
    pub(super) foreign: bool,
    pub(super) touched: bool,
    pub(super) alone: bool,
    /// An operator has made it what it is: what it acknowledges is no promise of ours.
    pub(super) by_hand: bool,
    /// It was promoted by hand, and its commits have waited for the guard ever since.
    pub(super) guarded: bool,
    /// Why no order to rejoin succeeds.
    pub(super) sick: Option<Code>,
    /// Its disk hangs: it commits nothing.
    pub(super) hung: bool,
    /// Names of standbys under which somebody else receives from it.
    pub(super) impostors: BTreeSet<Node>,
    /// Its commits that were acknowledged reach so far.
    pub(super) told: usize,
}

impl Machine {
    fn guard(&mut self) {
        self.wait_for = [GUARD.to_owned()].into();
    }
}

pub(super) struct World {
    pub(super) machines: BTreeMap<Node, Machine>,
    /// What whoever leads must have.
    pub(super) acknowledged: BTreeSet<u32>,
    /// What no act of ours may destroy.
    pub(super) precious: BTreeSet<u32>,
    /// NodeControl are at work that the cluster does not know of: an operator may have made two that acknowledge.
    pub(super) hostile: bool,
    pub(super) split: bool,
    pub(super) commits: u32,
    /// What happened, for whoever reads of a failure.
    pub(super) events: Vec<String>,
    pub(super) random: StdRng,
    pub(super) late: Vec<(Node, Command)>,
    /// The orchestrator dies at the save after so many.
    pub(super) saves_left: u32,
    pub(super) saved: State,
    /// Epoch and primary of the newest decision, whatever was restored since.
    pub(super) newest: (u64, Node),
    /// Timelines that were given out. None is given twice.
    timelines: BTreeSet<u32>,
}

pub(super) fn name(index: u16) -> Node {
    format!("region{index}")
}

pub(super) fn address(index: u16) -> Upstream {
    Upstream { host: "h".into(), port: index }
}

pub(super) fn port(node: &str) -> u16 {
    node.trim_start_matches("region").parse().unwrap()
}

impl World {
    pub(super) fn new(nodes: u16, seed: u64) -> Self {
        let machine = |index| Machine {
            reachable: true,
            frozen: false,
            powered: true,
            running: true,
            standby: index != 1,
            clean: true,
            upstream: (index != 1).then_some(1),
            wait_for: if index == 1 { BTreeSet::new() } else { [GUARD.to_owned()].into() },
            timeline: 1,
            epoch: 0,
            log: Vec::new(),
            marker: 0,
            data: true,
            estranged: false,
            obeys: String::new(),
            foreign: false,
            touched: false,
            alone: false,
            by_hand: false,
            guarded: false,
            sick: None,
            hung: false,
            impostors: BTreeSet::new(),
            told: 0,
        };
        Self {
            machines: (1..=nodes).map(|index| (name(index), machine(index))).collect(),
            acknowledged: BTreeSet::new(),
            precious: BTreeSet::new(),
            hostile: false,
            split: false,
            commits: 0,
            events: Vec::new(),
            random: StdRng::seed_from_u64(seed),
            late: Vec::new(),
            saves_left: u32::MAX,
            saved: State { id: "o".into(), ..State::first(name(1), "s".into(), BTreeSet::new()) },
            newest: (0, name(1)),
            timelines: [1].into(),
        }
    }

    /// The orchestrator's file.
    pub(super) fn record(&mut self, state: &State) {
        if state.epoch >= self.newest.0 {
            self.newest = (state.epoch, state.primary.clone());
        }
        self.saved = state.clone();
    }

    fn attached(&self, standby: &str, primary: &str) -> bool {
        let (Some(s), Some(p)) = (self.machines.get(standby), self.machines.get(primary)) else {
            return false;
        };
        s.running && s.standby && s.upstream == Some(port(primary)) && p.running && p.log.starts_with(&s.log)
    }

    /// Could acknowledge a commit, now or when it thaws.
    pub(super) fn can_acknowledge(&self, node: &str) -> bool {
        let machine = &self.machines[node];
        machine.running
            && !machine.standby
            && !machine.hung
            && machine
                .wait_for
                .iter()
                .all(|standby| self.attached(standby, node) || machine.impostors.contains(standby))
    }

    pub(super) fn check(&mut self) {
        let ours = |node: &&Node| self.can_acknowledge(node) && !self.machines[*node].by_hand;
        let able: Vec<_> = self.machines.keys().filter(ours).cloned().collect();
        if self.split {
            // What an operator has made is for a person to mend.
            self.split = able.len() > 1;
            return;
        }
        assert!(able.len() <= 1, "{able:?} can acknowledge: {:#?} {:#?}", self.machines, self.events);
        for node in able {
            let log: BTreeSet<u32> = self.machines[&node].log.iter().copied().collect();
            let lost: Vec<_> = self.acknowledged.difference(&log).collect();
            assert!(
                lost.is_empty(),
                "{node} leads without {lost:?}: {:#?} {:#?}",
                self.machines,
                self.events
            );
        }
    }

    /// Rewriting the data of `node` takes nothing away that is nowhere else.
    fn check_rewrite(&self, node: &str, log: &[u32]) {
        let elsewhere = |commit: &u32| {
            log.contains(commit)
                || self
                    .machines
                    .iter()
                    .any(|(other, machine)| other != node && machine.data && machine.log.contains(commit))
        };
        let lost: Vec<_> = self.machines[node]
            .log
            .iter()
            .filter(|commit| self.precious.contains(commit) && !elsewhere(commit))
            .collect();
        assert!(
            lost.is_empty(),
            "rewriting {node} destroys {lost:?}, which only it has: {:#?} {:#?} {:#?}",
            self.machines,
            self.saved,
            self.events
        );
    }

    fn stream(&mut self, standby: &str, primary: &str) -> bool {
        let thawed = |machine: &Machine| !machine.frozen;
        if !self.attached(standby, primary)
            || self.machines[primary].hung
            || !thawed(&self.machines[standby])
            || !thawed(&self.machines[primary])
        {
            return false;
        }
        let (log, timeline) = (self.machines[primary].log.clone(), self.machines[primary].timeline);
        let standby = self.machines.get_mut(standby).unwrap();
        standby.log = log;
        standby.timeline = timeline;
        true
    }

    /// What one node alone has acknowledged, because somebody had its commits wait for nobody, only the file knew that is
    /// replaced by an older one: no agent need have heard of it.
    pub(super) fn forgotten(&mut self) {
        for (node, machine) in &self.machines {
            let others = || self.machines.iter().filter(|(other, _)| *other != node);
            let alone = |commit: &u32| !others().any(|(_, other)| other.log.contains(commit));
            for commit in machine.log.iter().filter(|commit| machine.touched && alone(commit)) {
                self.acknowledged.remove(commit);
            }
        }
    }

    /// No fence holds one that a stranger helps to acknowledge, or whose commits somebody made wait for nobody, when the
    /// orchestrator does not see it; nor one that was given up for `leader`.
    pub(super) fn out_of_sight(&mut self, leader: Option<&str>) {
        for (node, machine) in &mut self.machines {
            let unseen = !machine.reachable || machine.frozen || !machine.powered;
            let unfenced = !machine.impostors.is_empty() || machine.touched;
            machine.by_hand |= unfenced && (unseen || leader.is_some_and(|leader| leader != node));
        }
    }

    /// A client commits on a node, wherever it lets it.
    pub(super) fn write(&mut self, node: &str) {
        let machine = self.machines.get_mut(node).unwrap();
        if !machine.running || machine.standby || machine.frozen {
            return;
        }
        if machine.hung {
            return;
        }
        self.commits += 1;
        machine.log.push(self.commits);
        let wait_for = machine.wait_for.clone();
        let mut all = true;
        for standby in &wait_for {
            all &= self.stream(standby, node) || self.machines[node].impostors.contains(standby);
        }
        if all {
            if !self.machines[node].by_hand {
                self.acknowledged.insert(self.commits);
            }
            self.precious.insert(self.commits);
            let machine = self.machines.get_mut(node).unwrap();
            machine.told = machine.log.len();
            self.events
                .push(format!("acknowledged {} by {node}, which waits for {wait_for:?}", self.commits));
        }
    }

    /// An agent carries an order out.
    pub(super) fn obey(&mut self, node: &str, command: &Command) -> Result<NodeStatus, OrderError> {
        let why = |code: Code, message: &str| OrderError::Refused {
            node: node.into(),
            code,
            message: message.into(),
        };
        let refuse = |message: &str| why(Code::Failed, message);
        let (epoch, order) = (command.epoch, &command.what);
        let machine = self.machines.get_mut(node).unwrap();
        if !machine.powered {
            return Err(OrderError::Gone(node.into()));
        }
        let obeyed = &machine.obeys;
        if !obeyed.is_empty() && *obeyed != command.orchestrator && !command.displaces.contains(obeyed) {
            return Err(why(Code::OtherOrchestrator, "another orchestrator"));
        }
        if epoch < machine.epoch {
            return Err(why(Code::OldEpoch, "old epoch"));
        }
        machine.epoch = epoch;
        machine.obeys.clone_from(&command.orchestrator);
        if machine.foreign {
            return Err(why(Code::Foreign, "not the agent's own"));
        }
        self.events.push(format!("order {node} {epoch} {order:?}"));
        let machine = self.machines.get_mut(node).unwrap();
        match order {
            Order::Promote { wait_for, above, .. } => {
                if !machine.data {
                    return Err(why(Code::NoData, "no data"));
                }
                machine.alone |= wait_for.is_empty();
                machine.wait_for.clone_from(wait_for);
                machine.running = true;
                machine.upstream = None;
                (machine.guarded, machine.told) = (false, 0);
                // An order that comes late brings no fence to one that a stranger helps to acknowledge.
                machine.by_hand = !machine.impostors.is_empty() && self.newest.1 != node;
                // One that was overtaken steps back and is promoted again.
                if machine.standby || machine.timeline <= *above {
                    machine.standby = false;
                    machine.timeline = machine.timeline.max(*above) + 1;
                    let fresh = self.timelines.insert(machine.timeline) || self.hostile;
                    assert!(fresh, "{node} leads on a timeline that another has used: {:#?}", self.machines);
                }
                self.out_of_sight(Some(node));
                let machine = self.machines.get_mut(node).unwrap();
                machine.estranged = false;
                machine.touched |= !machine.impostors.is_empty();
            }
            Order::Follow { upstream, how, leads, discarded, .. } => {
                let source = name(upstream.port);
                let ready = self.machines.get(&source).is_some_and(|s| s.running && !s.standby && !s.frozen);
                let (log, timeline) = (self.machines[&source].log.clone(), self.machines[&source].timeline);
                if self.machines[node].running && !self.machines[node].standby {
                    return Err(why(Code::Leads, "it is writable"));
                }
                let machine = self.machines.get_mut(node).unwrap();
                let used = machine.data && (machine.touched || machine.alone);
                if used && *how != Rejoin::Follow && !discarded {
                    return Err(why(Code::Touched, "somebody has used it"));
                }
                if *how != Rejoin::Follow && ready {
                    self.check_rewrite(node, &log);
                }
                let machine = self.machines.get_mut(node).unwrap();
                if let Some(code) = machine.sick {
                    return Err(why(code, "it is sick"));
                }
                match how {
                    Rejoin::Follow if !machine.data => return Err(why(Code::NoData, "no data")),
                    Rejoin::Follow if machine.estranged => return Err(why(Code::Estranged, "a primary's")),
                    Rejoin::Follow
                        if !machine.running
                            && !machine.standby
                            && (machine.touched || machine.timeline >= *leads) =>
                    {
                        return Err(why(Code::Estranged, "somebody has used it"));
                    }
                    Rejoin::Follow => {
                        // Postgres would not notice.
                        let mixed = ready && machine.timeline == timeline && !log.starts_with(&machine.log);
                        assert!(
                            !mixed,
                            "{node} would mix two histories: {:#?} {:#?}",
                            self.machines, self.events
                        );
                    }
                    _ if !ready => return Err(refuse("no source")),
                    Rejoin::Rewind if !machine.data || machine.timeline == timeline => {
                        return Err(why(Code::Unrewindable, "cannot be rewound"));
                    }
                    Rejoin::Rewind | Rejoin::Clone => {
                        machine.log.clone_from(&log);
                        machine.timeline = timeline;
                        (machine.data, machine.estranged, machine.touched) = (true, false, false);
                        machine.alone = false;
                    }
                }
                machine.running = true;
                machine.standby = true;
                machine.by_hand = false;
                machine.guard();
                machine.upstream = Some(upstream.port);
                if !self.stream(node, &source) {
                    let diverged = ready && !log.starts_with(&self.machines[node].log);
                    let code = if diverged { Code::Diverged } else { Code::NotStreaming };
                    return Err(why(code, "does not stream"));
                }
                self.machines.get_mut(node).unwrap().alone = false;
            }
            Order::StartDetached => {
                if !machine.data || machine.running && !machine.standby {
                    return Err(refuse("nothing to wake"));
                }
                if !machine.running {
                    machine.estranged |= !machine.standby;
                    machine.running = true;
                    machine.standby = true;
                    machine.guard();
                    machine.upstream = None;
                }
            }
            Order::Detach => {
                if machine.running && machine.standby {
                    machine.upstream = None;
                }
            }
            Order::Halt { how } => {
                if machine.running && !machine.standby && *how == Stop::Fast {
                    let standbys: Vec<_> =
                        self.machines.keys().filter(|s| self.attached(s, node)).cloned().collect();
                    for standby in standbys {
                        self.stream(&standby, node);
                    }
                }
                let machine = self.machines.get_mut(node).unwrap();
                if machine.running {
                    machine.clean = *how == Stop::Fast && !machine.hung;
                }
                (machine.running, machine.guarded) = (false, false);
            }
            Order::WaitFor { nodes } => {
                if !machine.running || machine.standby {
                    return Err(refuse("not a primary"));
                }
                machine.wait_for.clone_from(nodes);
                machine.guarded = false;
                machine.alone |= nodes.is_empty();
            }
            Order::ConfirmSync { standby } => {
                if !machine.running || machine.standby || !machine.wait_for.contains(standby) {
                    return Err(refuse("not so"));
                }
                if machine.impostors.contains(standby) || !self.stream(standby, node) {
                    return Err(refuse("not in sync"));
                }
                let machine = self.machines.get_mut(node).unwrap();
                (machine.touched, machine.alone) = (false, false);
            }
            Order::Checkpoint if machine.hung => return Err(refuse("it hangs")),
            Order::Checkpoint => {}
            Order::Mark { .. } if machine.hung => return Err(refuse("it hangs")),
            Order::Mark { epoch } => {
                machine.marker = *epoch;
            }
        }
        Ok(self.status(node))
    }

    fn lsn(machine: &Machine) -> Lsn {
        // Past the last record, as Postgres' received position is.
        Lsn(machine.log.len() as u64 * 10 + 1)
    }

    fn status(&self, node: &str) -> NodeStatus {
        let machine = &self.machines[node];
        let up = machine.upstream.map(address);
        let standbys = self.machines.keys().filter(|s| self.attached(s, node)).map(|s| Attached {
            node: s.clone(),
            streaming: true,
            sync: machine.wait_for.contains(s),
            slot: Some(s.clone()),
            flushed: Self::lsn(&self.machines[s]),
            replayed: Self::lsn(&self.machines[s]),
        });
        let impostors = machine.impostors.iter().map(|s| Attached {
            node: s.clone(),
            streaming: true,
            sync: machine.wait_for.contains(s),
            slot: None,
            flushed: Self::lsn(machine),
            replayed: Self::lsn(machine),
        });
        let receiver = machine.upstream.filter(|up| self.attached(node, &name(*up))).map(|up| Receiver {
            streaming: true,
            host: "h".into(),
            port: up,
            silent_ms: if self.machines[&name(up)].frozen { 10_000 } else { 0 },
        });
        let sample = Sample {
            in_recovery: machine.standby,
            timeline: machine.timeline,
            lsn: Self::lsn(machine),
            replayed: None,
            replay_paused: false,
            receiver,
            wait_for: machine.wait_for.clone(),
            standbys: standbys.chain(impostors).collect(),
            age_ms: 0,
            lag_seconds: 0.0,
        };
        let control = Control {
            timeline: machine.timeline,
            checkpoint: Lsn(Self::lsn(machine).0 - 1),
            state: if machine.clean { "shut down" } else { "in production" }.into(),
            standby: machine.standby,
        };
        let shown = machine.running && !machine.foreign;
        NodeStatus {
            epoch: machine.epoch,
            system_id: "s".into(),
            postmaster: if shown {
                Postmaster::Running
            } else {
                Postmaster::Stopped { exit: None, clean: machine.clean, settled: true }
            },
            upstream: up,
            sample: shown.then_some(sample),
            control: (!shown && machine.data).then_some(control),
            marker: machine.marker,
            pending: machine.hung,
            empty: !machine.data,
            // Of before the last commit, as the agent knows it.
            acknowledged: Lsn(machine.told as u64 * 10),
            orchestrator: machine.obeys.clone(),
            foreign: machine.foreign.then_some(1),
            touched: machine.touched,
            alone: machine.alone,
            guarded: machine.guarded && machine.running,
            estranged: machine.estranged,
            ..NodeStatus::unseen(node)
        }
    }

    pub(super) fn view(&self, now: Duration, cures: &BTreeMap<Node, Rejoin>) -> View {
        let mut view = View::default();
        for (node, machine) in &self.machines {
            let answers = machine.reachable && machine.powered && !machine.frozen;
            let refused = machine.reachable && !machine.powered;
            let seen = Seen {
                status: Some(self.status(node)),
                heard: Some(if answers { now } else { Duration::ZERO }),
                agent_refused: refused,
                probed: Some(if answers && machine.running { now } else { Duration::ZERO }),
                probe_refused: refused,
                cure: cures.get(node).copied(),
                tries: u32::from(cures.contains_key(node)),
                beat: (0, if machine.hung { Duration::ZERO } else { now }),
                ..Seen::default()
            };
            view.nodes.insert(node.clone(), seen);
        }
        view
    }

    /// A disk dies for good, unless it is the last one.
    pub(super) fn disk_dies(&mut self) {
        let nodes: Vec<Node> =
            self.machines.iter().filter(|(_, machine)| machine.data).map(|(node, _)| node.clone()).collect();
        if nodes.len() > 1 {
            let node = &nodes[self.random.random_range(0..nodes.len())];
            let machine = self.machines.get_mut(node).unwrap();
            (machine.running, machine.clean, machine.data) = (false, false, false);
            (machine.timeline, machine.estranged, machine.upstream) = (0, false, None);
            machine.log.clear();
            // The disk has destroyed it, not we.
            let left: BTreeSet<u32> =
                self.machines.values().flat_map(|machine| machine.log.iter().copied()).collect();
            self.precious.retain(|commit| left.contains(commit));
        }
    }

    /// The operator accepts that what `node` lacks is lost.
    pub(super) fn accept_loss(&mut self, node: &str) {
        let log: BTreeSet<u32> = self.machines[node].log.iter().copied().collect();
        self.acknowledged.retain(|commit| log.contains(commit));
    }

    pub(super) fn mishap(&mut self) {
        let nodes: Vec<Node> = self.machines.keys().cloned().collect();
        let node = nodes[self.random.random_range(0..nodes.len())].clone();
        let machine = self.machines.get_mut(&node).unwrap();
        match self.random.random_range(0..16) {
            0 => {
                (machine.running, machine.guarded, machine.foreign) = (false, false, false);
                machine.clean = false;
            }
            1 => {
                (machine.running, machine.guarded, machine.foreign) = (false, false, false);
                machine.clean = false;
                machine.powered = false;
                machine.frozen = false;
            }
            2 | 3 | 12 => machine.powered = true,
            4 => machine.frozen = machine.powered,
            5 | 6 | 13 => machine.frozen = false,
            7 => machine.reachable = false,
            8 | 9 | 14 => machine.reachable = true,
            10 => {
                let source = machine.upstream.map(name);
                if let Some(source) = source {
                    self.stream(&node, &source);
                }
            }
            _ => {
                if !self.late.is_empty() {
                    let index = self.random.random_range(0..self.late.len());
                    let (node, command) = self.late.swap_remove(index);
                    drop(self.obey(&node, &command));
                }
            }
        }
    }
}
