//! A simulated cluster on which the real decisions and operations run, with random faults.
//!
//! It is harsher than the world: clients write to every node that calls itself writable, orders get lost before or
//! after they are carried out or arrive much later, machines crash, freeze and come back, and the orchestrator dies
//! after any save. Two things must hold at every moment: at most one node can acknowledge, and a node that can
//! acknowledge has every acknowledged commit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;

use crate::decide::{Action, Rules, decide};
use crate::hands::{Hands, OrderError};
use crate::lsn::Lsn;
use crate::operation::{self, Kind, Operation, Request};
use crate::protocol::{
    Attached, Control, Node, NodeStatus, Order, Postmaster, Receiver, Rejoin, Sample, Stop, Upstream,
};
use crate::state::{Copies, State};
use crate::upkeep;
use crate::view::{Condition, Policy, Seen, View};

#[derive(Debug, Clone)]
struct Machine {
    /// Whether the orchestrator reaches it.
    reachable: bool,
    frozen: bool,
    powered: bool,
    running: bool,
    standby: bool,
    clean: bool,
    upstream: Option<u16>,
    wait_for: BTreeSet<Node>,
    timeline: u32,
    epoch: u64,
    /// Numbers of the commits it has, in order.
    log: Vec<u32>,
    marker: u64,
}

struct World {
    machines: BTreeMap<Node, Machine>,
    acknowledged: BTreeSet<u32>,
    commits: u32,
    random: StdRng,
    late: Vec<(Node, u64, Order)>,
    /// The orchestrator dies at the save after so many.
    saves_left: u32,
    saved: State,
}

fn name(index: u16) -> Node {
    format!("region{index}")
}

fn address(index: u16) -> Upstream {
    Upstream { host: "h".into(), port: index }
}

fn port(node: &str) -> u16 {
    node.trim_start_matches("region").parse().unwrap()
}

impl World {
    fn new(nodes: u16, seed: u64) -> Self {
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
        };
        Self {
            machines: (1..=nodes).map(|index| (name(index), machine(index))).collect(),
            acknowledged: BTreeSet::new(),
            commits: 0,
            random: StdRng::seed_from_u64(seed),
            late: Vec::new(),
            saves_left: u32::MAX,
            saved: State::first(name(1), "s".into(), BTreeSet::new()),
        }
    }

    fn attached(&self, standby: &str, primary: &str) -> bool {
        let (s, p) = (&self.machines[standby], &self.machines[primary]);
        s.running && s.standby && s.upstream == Some(port(primary)) && p.running && p.log.starts_with(&s.log)
    }

    /// Could acknowledge a commit, now or when it thaws.
    fn can_acknowledge(&self, node: &str) -> bool {
        let machine = &self.machines[node];
        machine.running
            && !machine.standby
            && machine.wait_for.iter().all(|standby| self.attached(standby, node))
    }

    fn check(&self) {
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
    fn write(&mut self, node: &str) {
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
    fn obey(&mut self, node: &str, epoch: u64, order: &Order) -> Result<NodeStatus, OrderError> {
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
            Order::Lead { wait_for, .. } => {
                machine.wait_for.clone_from(wait_for);
                machine.running = true;
                machine.upstream = None;
                if machine.standby {
                    machine.standby = false;
                    machine.timeline += 1;
                }
            }
            Order::Stand { upstream, how, .. } => {
                let source = name(upstream.port);
                let ready = self.machines.get(&source).is_some_and(|s| s.running && !s.standby && !s.frozen);
                let (log, timeline) = (self.machines[&source].log.clone(), self.machines[&source].timeline);
                let machine = self.machines.get_mut(node).unwrap();
                if *how != Rejoin::Follow {
                    if !ready {
                        return Err(refuse("no source"));
                    }
                    machine.log = log;
                    machine.timeline = timeline;
                }
                machine.running = true;
                machine.standby = true;
                machine.upstream = Some(upstream.port);
                if !self.stream(node, &source) {
                    return Err(refuse("does not stream"));
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
            control: (!machine.running).then_some(control),
            marker: machine.marker,
        }
    }

    fn view(&self, now: Duration, failed: &BTreeMap<Node, Rejoin>) -> View {
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

    fn mishap(&mut self) {
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

struct Simulated(Mutex<World>);

impl Hands for Simulated {
    async fn order(
        &self,
        node: &str,
        epoch: u64,
        order: Order,
        _: Duration,
    ) -> Result<NodeStatus, OrderError> {
        let mut world = self.0.lock().unwrap();
        let silent = || OrderError::Silent { node: node.into(), reason: "simulated".into() };
        let chaos = world.random.random_bool(0.15);
        if chaos {
            world.mishap();
        }
        let machine = &world.machines[node];
        let answer = if !machine.powered {
            Err(OrderError::Gone(node.into()))
        } else if !machine.reachable || machine.frozen {
            // In the socket of a frozen machine, or on a road that opens again.
            world.late.push((node.into(), epoch, order));
            Err(silent())
        } else {
            match if chaos { world.random.random_range(0..6) } else { 9 } {
                0 => Err(silent()),
                1 => {
                    world.late.push((node.into(), epoch, order));
                    Err(silent())
                }
                2 => world.obey(node, epoch, &order).and(Err(silent())),
                _ => world.obey(node, epoch, &order),
            }
        };
        world.check();
        for index in 1..=world.machines.len() {
            world.write(&name(index as u16));
        }
        world.check();
        answer
    }

    fn save(&self, state: &State) -> anyhow::Result<()> {
        let mut world = self.0.lock().unwrap();
        state.check().unwrap();
        if world.saves_left == 0 {
            // Whether the file arrived before the power went is a matter of luck.
            if world.random.random_bool(0.5) {
                world.saved = state.clone();
            }
            anyhow::bail!("the orchestrator died");
        }
        world.saves_left -= 1;
        world.saved = state.clone();
        Ok(())
    }

    fn passed(&self, _: &str) {}
}

struct Run {
    hands: Simulated,
    rules: Rules,
    state: State,
    failed: BTreeMap<Node, Rejoin>,
    now: Duration,
    changes: u32,
}

impl Run {
    fn new(nodes: u16, seed: u64, copies: Copies) -> Self {
        let world = World::new(nodes, seed);
        let state = world.saved.clone();
        let addresses = (1..=nodes).map(|index| (name(index), address(index))).collect();
        Self {
            hands: Simulated(Mutex::new(world)),
            rules: Rules { policy: Policy::default(), copies, addresses },
            state,
            failed: BTreeMap::new(),
            now: Duration::from_secs(100),
            changes: 0,
        }
    }

    fn world<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.hands.0.lock().unwrap())
    }

    async fn turn(&mut self, chaos: bool) {
        self.now += Duration::from_secs(1);
        let mut view = self.world(|world| world.view(self.now, &self.failed));
        view.note_absence(&self.state.primary, self.now, &self.rules.policy);
        let degrade = self.world(|world| world.random.random_bool(0.3));
        for seen in view.nodes.values_mut() {
            // How long it is missing is a matter of luck too.
            seen.absent_since = seen.absent_since.filter(|_| degrade).map(|_| Duration::ZERO);
        }
        let mut action = decide(&self.state, &view, &self.rules, self.now);
        if chaos {
            // What was seen is old by the time we act.
            self.world(|world| (0..world.random.random_range(0..2)).for_each(|_| world.mishap()));
            if self.world(|world| world.random.random_bool(0.05)) && self.state.operation.is_none() {
                action = Action::Nothing;
                self.switch_over(&view).await;
            }
        }
        if self.act(action).await.is_err() {
            self.reincarnate();
        }
    }

    async fn switch_over(&mut self, view: &View) {
        let target = self.state.sync_set.iter().next().cloned();
        let alive = view.condition(&self.state.primary, self.now, &self.rules.policy) == Condition::Alive;
        let Some(target) = target.filter(|_| alive) else { return };
        if self.change(Kind::Planned, target).await.is_err() {
            self.reincarnate();
        }
    }

    fn reincarnate(&mut self) {
        self.state = self.world(|world| {
            world.saves_left = u32::MAX;
            world.saved.clone()
        });
        self.failed.clear();
    }

    async fn change(&mut self, kind: Kind, target: Node) -> anyhow::Result<()> {
        let others: BTreeSet<Node> =
            self.rules.addresses.keys().filter(|node| **node != self.state.primary).cloned().collect();
        let mut wait_for: BTreeSet<Node> = others.iter().filter(|node| **node != target).cloned().collect();
        if wait_for.is_empty() && self.rules.copies == Copies::TwoCopies {
            wait_for.insert(self.state.primary.clone());
        }
        let request = Request {
            id: "x".into(),
            kind,
            target,
            actor: "test".into(),
            reason: "test".into(),
            started_at: Timestamp::UNIX_EPOCH,
            wait_for,
            standbys: others,
            addresses: self.rules.addresses.clone(),
            timeline: 0,
            marker: 0,
            bytes_at_risk: 0,
            guard: false,
        };
        let (operation, failure) =
            operation::begin(&self.hands, &mut self.state, request, Instant::now()).await?;
        self.close(&operation, failure.is_none())
    }

    fn close(&mut self, operation: &Operation, done: bool) -> anyhow::Result<()> {
        self.changes += u32::from(done && operation.is_decided());
        self.state.operation = None;
        self.hands.save(&self.state)
    }

    async fn act(&mut self, action: Action) -> anyhow::Result<()> {
        match &action {
            Action::Nothing => return Ok(()),
            Action::Resume => {
                let operation = self.state.operation.clone().unwrap();
                let (operation, failure) = operation::resume(&self.hands, &mut self.state, operation).await?;
                return self.close(&operation, failure.is_none());
            }
            Action::FailOver { target, .. } => {
                assert!(self.state.sync_set.contains(target), "outside the sync set");
                return self.change(Kind::Unplanned, target.clone()).await;
            }
            _ => {}
        }
        if upkeep::before(&mut self.state, &action) {
            self.hands.save(&self.state)?;
        }
        let Some((node, order, limit)) = upkeep::order(&self.state, &action, &self.rules) else {
            return Ok(());
        };
        let epoch = self.state.epoch;
        match self.hands.order(&node, epoch, order, limit).await {
            Ok(status) => {
                self.failed.remove(&node);
                if upkeep::after(&mut self.state, &action, epoch, &status) {
                    self.hands.save(&self.state)?;
                }
            }
            Err(_) => {
                if let Action::Rejoin { node, how } = action {
                    self.failed.insert(node, how);
                }
            }
        }
        Ok(())
    }
}

fn simulate(nodes: u16, seed: u64, copies: Copies, turns: u32) -> u32 {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut run = Run::new(nodes, seed, copies);
        for _ in 0..turns {
            if run.world(|world| world.random.random_bool(0.1)) {
                run.world(|world| world.saves_left = world.random.random_range(0..10));
            }
            run.turn(true).await;
        }
        // Peace: everything comes back, nothing gets lost any more; the cluster becomes whole by itself.
        run.world(|world| {
            world.saves_left = u32::MAX;
            for machine in world.machines.values_mut() {
                machine.powered = true;
                machine.reachable = true;
                machine.frozen = false;
            }
            world.late.clear();
        });
        for _ in 0..200 {
            run.turn(false).await;
            run.world(|world| {
                for machine in world.machines.values_mut() {
                    (machine.powered, machine.reachable, machine.frozen) = (true, true, false);
                }
            });
            if whole(&run) {
                break;
            }
        }
        assert!(whole(&run), "not whole: {:#?} {:#?}", run.state, run.world(|world| world.machines.clone()));
        run.changes
    })
}

fn whole(run: &Run) -> bool {
    let primary = &run.state.primary;
    run.state.operation.is_none()
        && run.world(|world| {
            run.state.sync_set.len() == world.machines.len() - 1
                && world.can_acknowledge(primary)
                && world.machines[primary].wait_for == run.state.wait_for
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn one_primary_acknowledges_and_nothing_is_lost(seed: u64, three: bool, two_copies: bool) {
        let copies = if two_copies { Copies::TwoCopies } else { Copies::Available };
        simulate(if three { 3 } else { 2 }, seed, copies, 150);
    }
}

/// The runs above would prove nothing if no failover ever succeeded in them.
#[test]
fn the_simulation_does_fail_over() {
    let changes: u32 = (0..20).map(|seed| simulate(2, seed, Copies::Available, 400)).sum();
    assert!(changes > 40, "{changes} changes of the primary in 20 runs");
}
