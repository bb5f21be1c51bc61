//! One turn of the orchestrator: the real decision and the real operation, with at most one disturbance on the way.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::sync::Mutex;
use std::task::Poll;
use std::time::Duration;

use failover_api::{Copies, Kind, Node};
use jiff::Timestamp;
use tokio::runtime::Runtime;
use tokio::time::{Instant, sleep};

use super::events::Event;
use super::seen::{NOW, index, name, view};
use super::world::{Cure, Durable, Late, Link, NOT_IN_SYNC, OLD_STATE, World, bits};
use crate::decide::{Action, Rules, decide};
use crate::journal::{Request, Step};
use crate::node_control::{NodeControl, OrderError};
use crate::operation;
use crate::orchestrator::checks;
use crate::protocol::{NodeStatus, Order, Rejoin};
use crate::state::State;
use crate::upkeep;
use crate::view::{Condition, View};

thread_local! {
    static RUNTIME: RefCell<Runtime> = RefCell::new(
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap(),
    );
}

/// What may go wrong once in a turn, at one of its orders or saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disturbance {
    /// This order, and every later one to the node in this turn, does not arrive.
    Lost,
    /// It is carried out, as later ones to the node are, and no answer arrives.
    Unanswered,
    /// It arrives at some later time; nothing else arrives at the node in this turn.
    Late,
    /// The orchestrator ends before the order is given,
    DiesBefore,
    /// when it has been carried out,
    DiesAfter,
    /// or before its state is written.
    DiesUnsaved,
    Happens(Event),
}

/// A disturbance, and at which order or save it comes.
pub(super) type Disturbed = (u8, Disturbance);

struct Inner {
    world: World,
    want: Option<Disturbed>,
    points: u8,
    offered: Vec<Disturbed>,
    /// A node whose orders or answers do not arrive.
    deaf: Option<(usize, bool)>,
    dead: bool,
    /// Of the state by which the turn is done, somebody has obeyed a newer one.
    old: bool,
}

enum Answer {
    Now(Box<NodeStatus>),
    /// After the time that the order was given.
    AtLast(OrderError),
    Never,
}

impl Inner {
    /// The disturbance that is to come here. Whatever could come is noted.
    fn point(&mut self, possible: impl FnOnce(&World) -> Vec<Disturbance>) -> Option<Disturbance> {
        let at = self.points;
        self.points += 1;
        match self.want {
            None => {
                self.offered.extend(possible(&self.world).into_iter().map(|disturbance| (at, disturbance)));
                None
            }
            Some((when, disturbance)) => (when == at).then_some(disturbance),
        }
    }

    fn order(&mut self, node: usize, epoch: u64, order: Order) -> Answer {
        if self.old {
            self.world.wrong |= OLD_STATE;
        }
        let silent = || OrderError::Silent { node: name(node), reason: String::new() };
        let disturbance = self.point(|world| {
            let mut possible = Vec::new();
            if world.left.mishaps > 0 && world.nodes[node].link == Link::Up {
                possible.extend([Disturbance::Lost, Disturbance::Unanswered]);
                possible.extend(world.late.is_none().then_some(Disturbance::Late));
                possible.extend([Disturbance::DiesBefore, Disturbance::DiesAfter]);
            }
            possible.extend(world.events().0.into_iter().map(Disturbance::Happens));
            possible
        });
        match disturbance {
            Some(Disturbance::Happens(event)) => self.world.happen(event),
            Some(_) => self.world.left.mishaps -= 1,
            None => {}
        }
        match disturbance {
            Some(Disturbance::DiesBefore) => {
                self.dead = true;
                return Answer::Never;
            }
            Some(Disturbance::Lost | Disturbance::Late) => self.deaf = Some((node, false)),
            Some(Disturbance::Unanswered) => self.deaf = Some((node, true)),
            _ => {}
        }
        if disturbance == Some(Disturbance::Late) {
            self.world.late = Some(Late { node, epoch, order });
            return Answer::AtLast(silent());
        }
        match (self.world.nodes[node].link, self.deaf) {
            (Link::Off, _) => return Answer::AtLast(OrderError::Gone(name(node))),
            (Link::Cut, _) => return Answer::AtLast(silent()),
            (Link::Up, Some((deaf, arrives))) if deaf == node => {
                if arrives {
                    drop(self.world.obey(node, epoch, &order));
                }
                return Answer::AtLast(silent());
            }
            _ => {}
        }
        let answer = self.world.obey(node, epoch, &order);
        if disturbance == Some(Disturbance::DiesAfter) {
            self.dead = true;
            return Answer::Never;
        }
        match answer {
            Err(error) => Answer::AtLast(error),
            Ok(status) => Answer::Now(Box::new(status)),
        }
    }
}

struct Table(Mutex<Inner>);

impl NodeControl for Table {
    async fn order(
        &self,
        node: &str,
        epoch: u64,
        order: Order,
        limit: Duration,
    ) -> Result<NodeStatus, OrderError> {
        let answer = self.0.lock().unwrap().order(index(node), epoch, order);
        match answer {
            // Orders that are given at once arrive before the first answer.
            Answer::Now(status) => {
                tokio::task::yield_now().await;
                Ok(*status)
            }
            Answer::AtLast(error) => {
                sleep(limit).await;
                Err(error)
            }
            Answer::Never => std::future::pending().await,
        }
    }

    fn save(&self, state: &State) -> anyhow::Result<()> {
        state.check().map_err(anyhow::Error::msg)?;
        let mut inner = self.0.lock().unwrap();
        let dies = |world: &World| {
            (world.left.mishaps > 0).then_some(Disturbance::DiesUnsaved).into_iter().collect()
        };
        if inner.point(dies).is_some() {
            inner.world.left.mishaps -= 1;
            inner.dead = true;
            anyhow::bail!("the orchestrator died");
        }
        inner.world.saved = Durable::of(state);
        inner.world.settle();
        Ok(())
    }

    fn passed(&self, _: &str) {}
}

/// How a turn ends, what was done, and by what it could have been disturbed.
pub(super) struct Turned {
    pub(super) world: World,
    /// It makes a difference for how long a standby is missing.
    pub(super) missing: bool,
    pub(super) action: &'static str,
    pub(super) offered: Vec<Disturbed>,
}

pub(super) fn turn(world: &World, rules: &Rules, long: bool, want: Option<Disturbed>) -> Turned {
    let mut state = (*world.saved.0).clone();
    let view = view(world, &state.primary, rules, long);
    let action = decide(&state, &view, rules, NOW);
    let missing = view.nodes.values().any(|seen| seen.absent_since.is_some());
    if action == Action::Nothing {
        let turned = Turned { world: world.clone(), missing, action: action.name(), offered: Vec::new() };
        return turned;
    }
    let knows_better = |epoch: u64| epoch > world.saved.0.epoch;
    let statuses = || view.nodes.values().filter_map(|seen| seen.status.as_ref());
    let mut before = world.clone();
    // Nobody can know from what was not heard.
    before.blind |= world.restored && !statuses().any(|status| knows_better(status.epoch));
    let inner = Inner {
        old: statuses().any(|status| knows_better(status.epoch)),
        world: before,
        want,
        points: 0,
        offered: Vec::new(),
        deaf: None,
        dead: false,
    };
    let table = Table(Mutex::new(inner));
    let survives = {
        let mut act = Box::pin(act(&table, &mut state, &view, rules, &action));
        RUNTIME.with_borrow(|runtime| {
            runtime.block_on(poll_fn(|context| {
                let polled = act.as_mut().poll(context);
                if table.0.lock().unwrap().dead {
                    return Poll::Ready(false);
                }
                polled.map(|outcome| {
                    outcome.unwrap();
                    true
                })
            }))
        })
    };
    let Inner { world: mut after, offered, .. } = table.0.into_inner().unwrap();
    if survives {
        assert_eq!(Durable::of(&state), after.saved, "{action:?} leaves something unsaved");
        promise(world, &view, &mut after, rules);
    } else {
        after.forget();
    }
    Turned { world: after, missing, action: action.name(), offered }
}

/// What an operator made the primary acknowledge alone is promised from the moment when the orchestrator has seen it: it must
/// not count anybody as in sync any more.
fn promise(world: &World, view: &View, after: &mut World, rules: &Rules) {
    let primary = &world.saved.0.primary;
    let node = index(primary);
    let sound = view.doubts(&world.saved.0, NOW, &rules.policy).is_empty();
    if sound && view.condition(primary, NOW, &rules.policy) == Condition::Alive && world.nodes[node].opened {
        after.promised |= world.acknowledged & bits(&world.nodes[node].log);
        after.nodes[node].opened = false;
        after.settle();
    }
}

/// As the engine does it.
async fn act(
    table: &Table,
    state: &mut State,
    view: &View,
    rules: &Rules,
    action: &Action,
) -> anyhow::Result<()> {
    match action {
        Action::Resume => {
            let operation = state.operation.clone().unwrap();
            operation::resume(table, state, operation).await?;
            return close(table, state);
        }
        Action::FailOver { target, .. } => {
            if !state.sync_set.contains(target) {
                table.0.lock().unwrap().world.wrong |= NOT_IN_SYNC;
            }
            let request = request(state, view, rules, target);
            let (operation, failure) = operation::begin(table, state, request, Instant::now()).await?;
            let fenced = failure.is_none() || operation.completed >= Step::Fence;
            close(table, state)?;
            let memory = &mut table.0.lock().unwrap().world.memory;
            memory.failed_fences = if fenced { 0 } else { 2.min(memory.failed_fences + 1) };
            return Ok(());
        }
        _ => {}
    }
    if upkeep::before(state, action, Timestamp::UNIX_EPOCH) {
        table.save(state)?;
    }
    let Some((node, order, limit)) = upkeep::order(state, action, rules) else { return Ok(()) };
    let (epoch, primary) = (state.epoch, state.primary.clone());
    let alive = view.condition(&primary, NOW, &rules.policy) == Condition::Alive;
    let lead = || upkeep::lead(state, rules, &primary);
    let first = match action {
        Action::Rejoin { how: Rejoin::Rewind, .. } => vec![lead(), Order::Checkpoint],
        Action::Rejoin { how: Rejoin::Follow, .. } if !alive => Vec::new(),
        Action::Rejoin { .. } => vec![lead()],
        _ => Vec::new(),
    };
    let mut result = Ok(());
    for order in first {
        if result.is_ok() {
            result = table.order(&primary, epoch, order, limit).await.map(drop);
        }
    }
    let result = match result {
        Ok(()) => table.order(&node, epoch, order, limit).await,
        Err(error) => Err(error),
    };
    let cure = |cure| table.0.lock().unwrap().world.memory.cures[index(&node)] = cure;
    match (result, action) {
        (Ok(status), _) => {
            cure(None);
            if upkeep::after(state, action, epoch, &status) {
                table.save(state)?;
            }
        }
        (Err(OrderError::Refused { code, .. }), Action::Rejoin { how, .. }) if alive => {
            if let Some(how) = code.cure(*how) {
                cure(Some(Cure::of(how)));
            }
        }
        _ => {}
    }
    Ok(())
}

fn request(state: &State, view: &View, rules: &Rules, target: &Node) -> Request {
    let source = view.node(&state.primary).and_then(|seen| seen.status.as_ref());
    let heard = view.nodes.iter().filter(|(_, seen)| seen.is_heard(NOW, &rules.policy));
    Request {
        id: "x".into(),
        kind: Kind::Unplanned,
        target: target.clone(),
        actor: "model".into(),
        reason: String::new(),
        started_at: Timestamp::UNIX_EPOCH,
        wait_for: checks::wait_for_after(target, state, view, rules, NOW),
        standbys: heard.map(|(node, _)| node).filter(|node| **node != state.primary).cloned().collect(),
        addresses: rules.addresses.clone(),
        timeline: view.timeline(state.above),
        marker: 0,
        acknowledged: source.map_or_else(Default::default, |status| status.acknowledged),
        bytes_at_risk: Some(0),
        two_copies: rules.copies == Copies::TwoCopies,
    }
}

fn close(table: &Table, state: &mut State) -> anyhow::Result<()> {
    state.operation = None;
    table.save(state)?;
    // What was ordered before the change says nothing about after it.
    table.0.lock().unwrap().world.memory.cures = [None, None];
    Ok(())
}
