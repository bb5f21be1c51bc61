//! A simulated cluster on which the real decisions and operations run, with random faults.
//!
//! It is harsher than the world: clients write to every node that calls itself writable, orders get lost before or
//! after they are carried out or arrive much later, machines crash, freeze and come back, and the orchestrator dies
//! after any save. Two things must hold at every moment: at most one node can acknowledge, and a node that can
//! acknowledge has every acknowledged commit.

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;
use rand::RngExt;
use tokio::time::Instant;

use crate::decide::{Action, Rules, decide};
use crate::hands::{Hands, OrderError};
use crate::operation::{self, Kind, Operation, Request};
use crate::orchestrator::checks::{self, Question};
use crate::protocol::{Node, NodeStatus, Order, Rejoin};
use crate::state::{Copies, Mode, State};
use crate::upkeep;
use crate::view::{Condition, Policy, View};
use world::{World, address, name};

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
    /// Forced by the operator, after a disk had died.
    forced: u32,
    /// Whether disks die.
    disasters: bool,
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
            forced: 0,
            disasters: false,
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
            let (chance, mode) =
                if self.state.mode == Mode::Auto { (0.02, Mode::Paused) } else { (0.2, Mode::Auto) };
            if self.world(|world| world.random.random_bool(chance)) {
                self.state.mode = mode;
            }
            if self.disasters && self.world(|world| world.random.random_bool(0.02)) {
                self.world(World::disk_dies);
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

    /// The operator, when the primary's data is gone: the node with the most, as soon as it may be promoted.
    async fn force(&mut self) {
        let gone = self.world(|world| !world.machines[&self.state.primary].data);
        if !gone || self.state.operation.is_some() {
            return;
        }
        let view = self.world(|world| world.view(self.now, &self.failed));
        let mut judged: Vec<_> = self
            .rules
            .addresses
            .keys()
            .filter_map(|node| {
                let question = Question {
                    target: node.clone(),
                    allow_data_loss: true,
                    while_paused: true,
                    ..Question::default()
                };
                let verdict = checks::judge(&question, &self.state, &view, &self.rules, self.now);
                Some((view.node(node)?.lsn(), node.clone(), verdict.outcome.ok()?))
            })
            .collect();
        judged.sort_by_key(|(lsn, node, _)| (*lsn, node.clone()));
        let Some((_, target, kind)) = judged.pop() else { return };
        if kind == Kind::Forced {
            self.world(|world| world.accept_loss(&target));
            self.forced += 1;
        }
        if self.change(kind, target).await.is_err() {
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
            timeline: self.world(|world| world.view(self.now, &self.failed)).timeline(self.state.above),
            marker: 0,
            bytes_at_risk: Some(0),
            guard: false,
            two_copies: self.rules.copies == Copies::TwoCopies,
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

fn simulate(nodes: u16, seed: u64, copies: Copies, turns: u32, disasters: bool) -> (u32, u32) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut run = Run::new(nodes, seed, copies);
        run.disasters = disasters;
        for _ in 0..turns {
            if run.world(|world| world.random.random_bool(0.1)) {
                run.world(|world| world.saves_left = world.random.random_range(0..10));
            }
            run.turn(true).await;
            if disasters {
                run.force().await;
            }
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
        run.state.mode = Mode::Auto;
        for _ in 0..200 {
            run.turn(false).await;
            if disasters {
                run.force().await;
            }
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
        (run.changes, run.forced)
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
        simulate(if three { 3 } else { 2 }, seed, copies, 150, false);
    }

    /// Disks die too, and an operator accepts the loss: what is left leads, and the cluster is whole again.
    #[test]
    fn after_a_disk_has_died_what_is_left_can_lead(seed: u64, three: bool) {
        simulate(if three { 3 } else { 2 }, seed, Copies::Available, 150, true);
    }
}

/// The runs above would prove nothing if no failover ever succeeded in them.
#[test]
fn the_simulation_does_fail_over() {
    let changes: u32 = (0..20).map(|seed| simulate(2, seed, Copies::Available, 400, false).0).sum();
    assert!(changes > 40, "{changes} changes of the primary in 20 runs");
    let forced: u32 = (0..20).map(|seed| simulate(2, seed, Copies::Available, 400, true).1).sum();
    assert!(forced > 10, "{forced} forced in 20 runs");
}
