//! An exhaustive model of the decision core: every run of two nodes and one orchestrator within a budget of what may happen.
//!
//! The simulation draws long runs at random from a rich world. This explores a small world to its end, breadth first, so that
//! counterexamples are short. What decides and acts is the real code: [`decide()`](crate::decide::decide),
//! [`crate::upkeep`], [`crate::operation`], [`crate::view::View`] and [`report::alarms`] on the real
//! [`State`](crate::state::State). What an agent and its Postgres do with an order is modelled in `agent.rs`, after
//! [`crate::agent`].
//!
//! Covered, each up to its budget: clients that commit on every node that is writable, with a standby that has the commit at
//! once or later; a postmaster that crashes, a machine that goes off, a node that the orchestrator does not reach, a road
//! between the nodes that is cut; a standby that is missing for a moment or for long. An order that is lost, that is carried
//! out and not answered, or that arrives at any later time; an orchestrator that ends before or after any order, or before
//! any save. An operator who promotes a standby by hand, resets what commits wait for, or starts a stopped node beside its
//! agent. A copy of the orchestrator's state that is made at any moment, also in the middle of a failover, and restored at
//! any later one. All of it also between two orders of one failover, but at most one disturbance in a turn.
//!
//! Not covered: a third node; an order of the upkeep that is under way while another turn begins, but for one that is late;
//! switchovers, forced failovers, a paused orchestrator, what a person adopts or discards; a second orchestrator and other
//! people's receivers; disks that hang, fill or die; waiting between tries (`not_before`), which is taken to be over; a standby
//! that flaps; the second that an agent takes to notice that commits wait for less; WAL other than commits, so that two
//! histories without commits of their own count as one.
//!
//! Nobody can know that restored state is old while every node is silent that has obeyed what came later (`World::blind`). From
//! there on two may acknowledge and a leader may lack something, but nothing may be destroyed even so.

mod agent;
mod events;
mod seen;
mod turn;
mod world;

use std::collections::HashSet;
use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

use failover_api::Copies;
use stateright::{Checker, Expectation, HasDiscoveries, Model, Path, Property};

use crate::decide::{self, Rules};
use crate::orchestrator::report;
use crate::view::View;
use events::Event;
use seen::{NOW, index, view};
use turn::{Disturbed, turn};
use world::{Budget, World, bits};

/// Turns after which whatever is on its way has arrived, if nothing else happens.
const ENOUGH: usize = 30;

/// A step of the model.
#[derive(Clone, PartialEq)]
enum Move {
    Happens(Event),
    /// The orchestrator does something. The world after it comes along, since it took some time to find.
    Turn {
        action: &'static str,
        /// What is missing is missing for long.
        long: bool,
        disturbed: Option<Disturbed>,
        after: Box<World>,
    },
}

impl fmt::Debug for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Happens(event) => write!(f, "{event:?}"),
            Self::Turn { action, long, disturbed, .. } => {
                write!(f, "turn: {action}{}", if *long { ", missing for long" } else { "" })?;
                disturbed.iter().try_for_each(|(at, what)| write!(f, ", at {at} {what:?}"))
            }
        }
    }
}

struct Pair {
    rules: Rules,
    left: Budget,
    /// Hashes of mended worlds that are known to recover, since many worlds are the same when they are mended.
    recover: Mutex<HashSet<u64>>,
}

impl Pair {
    fn new(copies: Copies, left: Budget) -> Self {
        Self { rules: Rules { copies, ..decide::tests::rules() }, left, recover: Mutex::default() }
    }

    /// What the orchestrator sees when whatever is missing is missing for long.
    fn view(&self, world: &World) -> View {
        view(world, &world.saved.0.primary, &self.rules, true)
    }

    fn alarms(&self, world: &World) -> Vec<String> {
        report::alarms(&world.saved.0, &self.view(world), &self.rules, NOW)
    }

    fn doubts(&self, world: &World) -> bool {
        !self.view(world).doubts(&world.saved.0, NOW, &self.rules.policy).is_empty()
    }

    /// The first of the next turns in which nothing else happens that is `enough`, or the one after which nothing changes.
    fn at_last(&self, world: &World, enough: impl Fn(&World) -> bool) -> World {
        let mut world = world.clone();
        for _ in 0..ENOUGH {
            if enough(&world) {
                break;
            }
            let next = turn(&world, &self.rules, true, None).world;
            if world.is_repeated_by(&next) {
                break;
            }
            world = next;
        }
        world
    }

    /// It serves, or tells somebody, or comes to one of these when nothing else happens.
    fn serves_or_tells(&self, world: &World) -> bool {
        let serves = |world: &World| world.can_acknowledge(index(&world.saved.0.primary));
        let well = |world: &World| serves(world) || !self.alarms(world).is_empty();
        well(world) || well(&self.at_last(world, well))
    }

    /// When everything else is mended, it has two copies in the end, or names what only a person may do.
    fn recovers_or_asks(&self, world: &World) -> bool {
        let mut mended = world.clone();
        mended.mend();
        let mut hasher = DefaultHasher::new();
        mended.hash(&mut hasher);
        let hash = hasher.finish();
        if self.recover.lock().unwrap().contains(&hash) {
            return true;
        }
        let last = self.at_last(&mended, World::is_whole);
        let asks = |alarm: &String| alarm.contains("POST /adopt/") || alarm.contains("POST /discard/");
        let fine = last.is_whole() || self.alarms(&last).iter().any(asks);
        if fine {
            self.recover.lock().unwrap().insert(hash);
        }
        fine
    }

    /// Everything that a turn may come to.
    fn turns(&self, world: &World, moves: &mut Vec<Move>) {
        for long in [false, true] {
            let smooth = turn(world, &self.rules, long, None);
            let missing = smooth.missing;
            let disturbances = smooth.offered.clone();
            let disturbed =
                disturbances.into_iter().map(|at| (Some(at), turn(world, &self.rules, long, Some(at))));
            for (disturbed, turned) in std::iter::once((None, smooth)).chain(disturbed) {
                let after = Box::new(turned.world);
                let known =
                    |known: &Move| matches!(known, Move::Turn { after: known, .. } if *known == after);
                if !world.is_repeated_by(&after) && !moves.iter().any(known) {
                    moves.push(Move::Turn { action: turned.action, long, disturbed, after });
                }
            }
            if !missing {
                return;
            }
        }
    }
}

impl Model for Pair {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.rules.copies, self.left)]
    }

    fn actions(&self, world: &World, moves: &mut Vec<Move>) {
        // What follows from something wrong is of no interest.
        if world.wrong == 0 {
            let (swift, other) = world.events();
            moves.extend(swift.into_iter().chain(other).map(Move::Happens));
            self.turns(world, moves);
        }
    }

    fn next_state(&self, world: &World, step: Move) -> Option<World> {
        match step {
            Move::Happens(event) => {
                let mut world = world.clone();
                world.happen(event);
                Some(world)
            }
            Move::Turn { after, .. } => Some(*after),
        }
    }

    fn properties(&self) -> Vec<Property<Self>> {
        type Always = fn(&Pair, &World) -> bool;
        let always: [(&'static str, Always); 9] = [
            ("every acknowledged commit is on a node", |_, world| {
                let held = bits(&world.nodes[0].log) | bits(&world.nodes[1].log);
                world.acknowledged & !held == 0
            }),
            ("at most one node acknowledges", |_, world| world.wrong & world::TWO_ACKNOWLEDGE == 0),
            ("whoever leads has what was promised", |_, world| world.wrong & world::LEADER_LACKS == 0),
            ("nothing is rewritten that the source lacks", |_, world| world.wrong & world::REWRITTEN == 0),
            ("histories are not mixed", |_, world| world.wrong & world::MIXED == 0),
            ("old state leads to no order", |_, world| world.wrong & world::OLD_STATE == 0),
            ("only a member of the sync set is promoted", |_, world| world.wrong & world::NOT_IN_SYNC == 0),
            ("it serves or there is an alarm", Self::serves_or_tells),
            ("it recovers or asks", Self::recovers_or_asks),
        ];
        let sometimes: [(&'static str, bool, Always); 4] = [
            ("a failover", self.left.breaks > 0, |_, world| world.saved.0.primary == "b"),
            ("a rejoin", self.left.breaks > 0, |_, world| {
                world.saved.0.primary == "b" && world.saved.0.sync_set.contains("a")
            }),
            ("a failover after a return", self.left.breaks > 1, |_, world| {
                world.saved.0.primary == "a" && world.saved.0.above >= 2
            }),
            ("a doubt", self.left.acts + self.left.restores > 0, Self::doubts),
        ];
        let sometimes = sometimes.into_iter().filter(|(_, possible, _)| *possible);
        let sometimes = sometimes.map(|(name, _, condition)| Property::sometimes(name, condition));
        always
            .into_iter()
            .map(|(name, condition)| Property::always(name, condition))
            .chain(sometimes)
            .collect()
    }
}

/// Explores everything within a budget. How many worlds there are.
fn explore(copies: Copies, left: Budget) -> usize {
    let checker = Pair::new(copies, left).checker();
    let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let mut found = checker.discoveries();
    for property in checker.model().properties() {
        let (name, path) = (property.name, found.remove(property.name));
        match property.expectation {
            Expectation::Always => {
                assert!(path.is_none(), "{copies:?} {left:?}: not so: {name}{}", told(path.unwrap()));
            }
            _ => assert!(path.is_some(), "{copies:?} {left:?}: never so: {name}"),
        }
    }
    println!("{copies:?} {left:?}: {} worlds, {} moves", checker.unique_state_count(), checker.state_count());
    checker.unique_state_count()
}

/// A counterexample, step by step.
fn told(path: Path<World, Move>) -> String {
    let mut text = String::new();
    for (world, step) in path.into_vec() {
        let state = &world.saved.0;
        let [a, b] = &world.nodes;
        let operation = state.operation.as_ref().map(|operation| operation.completed);
        writeln!(
            text,
            "\n    a {a:?}\n    b {b:?}\n    epoch {}, primary {}, sync set {:?}, waits for {:?}, above {}, kept {:?}, operation \
             {operation:?}; acknowledged {:b}, promised {:b}",
            state.epoch,
            state.primary,
            state.sync_set,
            state.wait_for,
            state.above,
            state.kept.keys(),
            world.acknowledged,
            world.promised
        )
        .unwrap();
        step.iter().for_each(|step| write!(text, "{step:?}").unwrap());
    }
    text
}

/// `TIER0_BUDGET=commits,breaks,mishaps,acts,restores` explores another budget, with both numbers of copies.
#[test]
fn within_a_budget_nothing_is_lost_and_somebody_is_told() {
    use Copies::{Available, TwoCopies};
    let mut budgets = vec![
        // Commits, breaks, mishaps, acts, restores; and how many worlds there are at least.
        (Available, [3, 2, 0, 0, 0], 14_000),
        (Available, [2, 2, 1, 0, 0], 55_000),
        (Available, [2, 1, 1, 1, 0], 80_000),
        (Available, [2, 1, 1, 0, 1], 30_000),
        (Available, [1, 2, 0, 1, 0], 25_000),
        (Available, [1, 1, 0, 1, 1], 20_000),
        (Available, [1, 2, 0, 0, 1], 15_000),
        (TwoCopies, [1, 2, 0, 1, 0], 14_000),
        (TwoCopies, [2, 1, 1, 0, 1], 12_000),
    ];
    if let Ok(given) = std::env::var("TIER0_BUDGET") {
        let given: Vec<u8> = given.split(',').map(|number| number.parse().unwrap()).collect();
        let given: [u8; 5] = given.try_into().expect("TIER0_BUDGET=commits,breaks,mishaps,acts,restores");
        budgets = vec![(Available, given, 1), (TwoCopies, given, 1)];
    }
    for (copies, [commits, breaks, mishaps, acts, restores], least) in budgets {
        let worlds = explore(copies, Budget { commits, breaks, mishaps, acts, restores });
        assert!(worlds >= least, "only {worlds} worlds: does the model still do anything?");
    }
}
