//! The machines of the simulation: what an agent and a Postgres would do, and what can happen to them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::hands::OrderError;
use crate::lsn::Lsn;
use crate::protocol::{
    Attached, Control, Node, NodeStatus, Order, Postmaster, Receiver, Rejoin, Sample, Stop, Upstream,
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
}

pub(super) struct World {
    pub(super) machines: BTreeMap<Node, Machine>,
    pub(super) acknowledged: BTreeSet<u32>,
    pub(super) commits: u32,
    pub(super) random: StdRng,
    pub(super) late: Vec<(Node, u64, Order)>,
    /// The orchestrator dies at the save after so many.
    pub(super) saves_left: u32,
    pub(super) saved: State,
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
            wait_for: BTreeSet::new(),
            timeline: 1,
            epoch: 0,
            log: Vec::new(),
            marker: 0,
            data: true,
            estranged: false,
        };
        Self {
            machines: (1..=nodes).map(|index| (name(index), machine(index))).collect(),
            acknowledged: BTreeSet::new(),
            commits: 0,
            random: StdRng::seed_from_u64(seed),
            late: Vec::new(),
            saves_left: u32::MAX,
            saved: State::first(name(1), "s".into(), BTreeSet::new()),
            timelines: [1].into(),
        }
    }

    fn attached(&self, standby: &str, primary: &str) -> bool {
        let (s, p) = (&self.machines[standby], &self.machines[primary]);
        s.running && s.standby && s.upstream == Some(port(primary)) && p.running && p.log.starts_with(&s.log)
    }

    /// Could acknowledge a commit, now or when it thaws.
    pub(super) fn can_acknowledge(&self, node: &str) -> bool {
        let machine = &self.machines[node];
        machine.running
            && !machine.standby
            && machine.wait_for.iter().all(|standby| self.attached(standby, node))
    }

    pub(super) fn check(&self) {
        let able: Vec<_> = self.machines.keys().filter(|node| self.can_acknowledge(node)).collect();
        assert!(able.len() <= 1, "{able:?} can acknowledge: {:#?}", self.machines);
        for node in able {
            let log: BTreeSet<u32> = self.machines[node].log.iter().copied().collect();
            let lost: Vec<_> = self.acknowledged.difference(&log).collect();
            assert!(lost.is_empty(), "{node} leads without {lost:?}: {:#?}", self.machines);
        }
    }

    fn stream(&mut self, standby: &str, primary: &str) -> bool {
        let thawed = |machine: &Machine| !machine.frozen;
        if !self.attached(standby, primary)
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

    /// A client commits on a node, wherever it lets it.
    pub(super) fn write(&mut self, node: &str) {
        let machine = self.machines.get_mut(node).unwrap();
        if !machine.running || machine.standby || machine.frozen {
            return;
        }
        self.commits += 1;
        machine.log.push(self.commits);
        let wait_for = machine.wait_for.clone();
        let mut all = true;
        for standby in &wait_for {
            all &= self.stream(standby, node);
        }
        if all {
            self.acknowledged.insert(self.commits);
        }
    }

    /// An agent carries an order out.
    pub(super) fn obey(&mut self, node: &str, epoch: u64, order: &Order) -> Result<NodeStatus, OrderError> {
        let refuse = |message: &str| OrderError::Refused {
            node: node.into(),
            code: "x".into(),
            message: message.into(),
        };
        let machine = self.machines.get_mut(node).unwrap();
        if !machine.powered {
            return Err(OrderError::Gone(node.into()));
        }
        if epoch < machine.epoch {
            return Err(refuse("old epoch"));
        }
        machine.epoch = epoch;
        match order {
            Order::Lead { wait_for, above, .. } => {
                if !machine.data {
                    return Err(refuse("no data"));
                }
                machine.wait_for.clone_from(wait_for);
                machine.running = true;
                machine.upstream = None;
                if machine.standby {
                    machine.standby = false;
                    machine.timeline = machine.timeline.max(*above) + 1;
                    let fresh = self.timelines.insert(machine.timeline);
                    assert!(fresh, "{node} leads on a timeline that another has used: {:#?}", self.machines);
                }
                self.machines.get_mut(node).unwrap().estranged = false;
            }
            Order::Stand { upstream, how, .. } => {
                let source = name(upstream.port);
                let ready = self.machines.get(&source).is_some_and(|s| s.running && !s.standby && !s.frozen);
                let (log, timeline) = (self.machines[&source].log.clone(), self.machines[&source].timeline);
                let machine = self.machines.get_mut(node).unwrap();
                match how {
                    Rejoin::Follow if !machine.data || machine.estranged => return Err(refuse("no data")),
                    Rejoin::Follow => {
                        // Postgres would not notice.
                        let mixed = ready && machine.timeline == timeline && !log.starts_with(&machine.log);
                        assert!(!mixed, "{node} would mix two histories: {:#?}", self.machines);
                    }
                    _ if !ready => return Err(refuse("no source")),
                    Rejoin::Rewind if !machine.data || machine.timeline == timeline => {
                        return Err(refuse("cannot be rewound"));
                    }
                    Rejoin::Rewind | Rejoin::Clone => {
                        machine.log = log;
                        machine.timeline = timeline;
                        (machine.data, machine.estranged) = (true, false);
                    }
                }
                machine.running = true;
                machine.standby = true;
                machine.upstream = Some(upstream.port);
                if !self.stream(node, &source) {
                    return Err(refuse("does not stream"));
                }
            }
            Order::Wake { .. } => {
                if !machine.data || machine.running && !machine.standby {
                    return Err(refuse("nothing to wake"));
                }
                if !machine.running {
                    machine.estranged |= !machine.standby;
                    machine.running = true;
                    machine.standby = true;
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
                    machine.clean = *how == Stop::Fast;
                }
                machine.running = false;
            }
            Order::WaitFor { nodes } => {
                if !machine.running || machine.standby {
                    return Err(refuse("not a primary"));
                }
                machine.wait_for.clone_from(nodes);
            }
            Order::ConfirmSync { standby } => {
                if !machine.running || machine.standby || !machine.wait_for.contains(standby) {
                    return Err(refuse("not so"));
                }
                if !self.stream(standby, node) {
                    return Err(refuse("not in sync"));
                }
            }
            Order::Checkpoint => {}
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
            flushed: Self::lsn(&self.machines[s]),
            replayed: Self::lsn(&self.machines[s]),
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
            standbys: standbys.collect(),
            age_ms: 0,
            lag_seconds: 0.0,
        };
        let control = Control {
            timeline: machine.timeline,
            checkpoint: Lsn(Self::lsn(machine).0 - 1),
            state: if machine.clean { "shut down" } else { "in production" }.into(),
            standby: machine.standby,
        };
        NodeStatus {
            node: node.into(),
            boot: 1,
            seq: 1,
            epoch: machine.epoch,
            system_id: "s".into(),
            postmaster: if machine.running {
                Postmaster::Running
            } else {
                Postmaster::Stopped { exit: None, clean: machine.clean, settled: true }
            },
            upstream: up,
            sample: machine.running.then_some(sample),
            control: (!machine.running && machine.data).then_some(control),
            marker: machine.marker,
            estranged: machine.estranged,
        }
    }

    pub(super) fn view(&self, now: Duration, failed: &BTreeMap<Node, Rejoin>) -> View {
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
                absent_since: None,
                busy: false,
                failed: failed.get(node).copied(),
                not_before: Duration::ZERO,
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
                machine.running = false;
                machine.clean = false;
            }
            1 => {
                machine.running = false;
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
                    let (node, epoch, order) = self.late.swap_remove(index);
                    drop(self.obey(&node, epoch, &order));
                }
            }
        }
    }
}
