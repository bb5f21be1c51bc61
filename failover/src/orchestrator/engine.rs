//! The one task that owns the state: looks, decides, acts, and answers what people ask.
//!
//! A change of the primary is carried out here and nothing else meanwhile; upkeep runs beside it, one order per node
//! at a time, and an answer that was overtaken by a change of the epoch counts for nothing.

mod change;
mod person;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use failover_api::{Kind, Mode, Node, RedisReport};
use jiff::Timestamp;
use service::health::Dependency;
use service::traces::Tracer;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::decide::{Action, Rules, decide};
use crate::history::{Entry, History};
use crate::journal::Step;
use crate::node_control::{NodeControl, OrderError};
use crate::operation;
use crate::orchestrator::adopt::AdoptQuestion;
use crate::orchestrator::checks::{self, Denied, Question};
use crate::orchestrator::metrics::Metrics;
use crate::orchestrator::redis::Redis;
use crate::orchestrator::remote::Remote;
use crate::orchestrator::{report, start};
use crate::protocol::{Code, NodeStatus, Order, Rejoin};
use crate::state::{Answered, State};
use crate::upkeep;
use crate::view::Condition;

/// Time alone can be a reason to act.
const TICK: Duration = Duration::from_millis(50);
/// After an order that failed.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(30);
const CHECKPOINT: Duration = Duration::from_secs(120);

/// What a person asks the engine to do.
#[derive(Debug)]
pub enum Asked {
    Change {
        question: Question,
        answered: Option<Answered>,
        id: String,
        actor: String,
        reply: oneshot::Sender<Result<Box<Entry>, Denied>>,
    },
    Mode {
        mode: Mode,
        reply: oneshot::Sender<State>,
    },
    Adopt {
        question: AdoptQuestion,
        id: String,
        actor: String,
        reply: oneshot::Sender<Result<Box<Entry>, Denied>>,
    },
    Discard {
        region: Node,
        reason: String,
        id: String,
        actor: String,
        reply: oneshot::Sender<Result<Box<Entry>, Denied>>,
    },
}

/// An order of the upkeep that came back.
#[derive(Debug)]
struct Done {
    action: Action,
    node: Node,
    epoch: u64,
    result: Result<NodeStatus, OrderError>,
}

/// The owner of the state.
#[derive(Debug)]
pub struct Engine {
    pub remote: Arc<Remote>,
    pub history: Arc<Mutex<History>>,
    pub rules: Rules,
    pub first_primary: String,
    pub redis: Option<Redis>,
    pub redis_seen: watch::Receiver<RedisReport>,
    pub metrics: Metrics,
    /// Is told of each change of the primary.
    pub tracer: Tracer,
    pub asked: mpsc::Receiver<Asked>,
    pub ready: Dependency,
    /// After a failover that failed none begins by itself before this time of the watch.
    pub not_again_before: Duration,
    /// The last change that began by itself and failed: the next that fails alike is not told again.
    pub told: Option<(Node, Step)>,
}

impl Engine {
    /// Runs until the token is cancelled.
    ///
    /// # Errors
    /// When the state can no longer be made durable: nothing may be done then.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut state = match self.remote.store().load()? {
            Some(state) => self.found(state)?,
            None => match self.first(&shutdown).await? {
                Some(state) => state,
                None => return Ok(()),
            },
        };
        let mut orders: JoinSet<Done> = JoinSet::new();
        let mut alarms = Vec::new();
        loop {
            match self.turn(&mut state, &mut orders, &mut alarms, &shutdown).await {
                Ok(()) => self.remote.note_saved(None),
                Err(error) => {
                    orders = JoinSet::new();
                    match self.recover(&error, &shutdown).await? {
                        Some(found) => state = found,
                        None => return Ok(()),
                    }
                }
            }
            if shutdown.is_cancelled() {
                return Ok(());
            }
        }
    }

    /// Something was not made durable: a full disk, most likely. Nothing that relies on it may be done: back to what is written,
    /// as soon as something can be written again.
    async fn recover(
        &self,
        error: &anyhow::Error,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Option<State>> {
        let mut error = format!("{error:#}");
        tracing::error!(error, "not made durable; nothing is done until it can be");
        self.remote.watched.revise(|view| view.nodes.values_mut().for_each(|seen| seen.busy = false));
        loop {
            self.remote.note_saved(Some(error.clone()));
            self.ready.down(error);
            if timeout(PAUSE, shutdown.cancelled()).await.is_ok() {
                return Ok(None);
            }
            let found = self.remote.store().load()?.context("the state is gone")?;
            // The same again shows whether there is room now.
            match self.remote.save(&found) {
                Ok(()) => return Ok(Some(found)),
                Err(again) => error = format!("{again:#}"),
            }
        }
    }

    /// Whatever is to be done now, then waits for the next reason to look.
    async fn turn(
        &mut self,
        state: &mut State,
        orders: &mut JoinSet<Done>,
        alarms: &mut Vec<String>,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<()> {
        while !shutdown.is_cancelled() && self.step(state, orders).await? {}
        self.show(state, alarms);
        let watched = self.remote.watched.clone();
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = watched.changed.notified() => {}
            () = tokio::time::sleep(TICK) => {}
            Some(done) = orders.join_next() => {
                self.came_back(state, done.context("an order's task failed")?)?;
            }
            Some(asked) = self.asked.recv() => self.answer(state, asked).await?,
        }
        Ok(())
    }

    /// State of an earlier version has no id yet.
    fn found(&self, mut state: State) -> anyhow::Result<State> {
        let (primary, epoch, operation) = (&state.primary, state.epoch, state.operation.is_some());
        tracing::info!(primary, epoch, operation, id = state.id, "state found");
        if state.id.is_empty() {
            state.id = new_id();
            self.remote.save(&state)?;
        }
        self.remote.found(&state);
        Ok(state)
    }

    async fn first(&mut self, shutdown: &CancellationToken) -> anyhow::Result<Option<State>> {
        let watched = self.remote.watched.clone();
        let mut said = String::new();
        loop {
            match start::first_state(&watched.view(), &self.rules, &self.first_primary, watched.now()) {
                Ok(state) => {
                    let state = State { id: new_id(), ..state };
                    tracing::warn!(
                        primary = state.primary,
                        epoch = state.epoch,
                        "no state found: first start"
                    );
                    self.remote.save(&state)?;
                    return Ok(Some(state));
                }
                Err(reason) => {
                    self.ready.down(reason.clone());
                    self.remote.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&reason);
                    if reason != said {
                        tracing::warn!(reason, "waiting for the first state");
                        said = reason;
                    }
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return Ok(None),
                () = watched.changed.notified() => {}
                () = tokio::time::sleep(TICK) => {}
                Some(asked) = self.asked.recv() => {
                    if let Some(state) = self.answer_first(asked)? {
                        return Ok(Some(state));
                    }
                }
            }
        }
    }

    /// Does the most urgent thing; false when there is none.
    async fn step(&mut self, state: &mut State, orders: &mut JoinSet<Done>) -> anyhow::Result<bool> {
        let watched = &self.remote.watched;
        let now = watched.now();
        let view = watched.revise(|view| {
            view.note(&state.primary, now, &self.rules.policy);
            view.clone()
        });
        let action = decide(state, &view, &self.rules, now);
        match &action {
            Action::Nothing => return Ok(false),
            Action::Resume => {
                let operation = state.operation.clone().context("an operation to resume")?;
                tracing::warn!(id = operation.id, step = operation.completed.name(), "resuming an operation");
                self.remote.passed.send_replace(String::new());
                let (remote, since) = (self.remote.clone(), Instant::now());
                let began = operation.started_at;
                let run = operation::resume(&*remote, state, operation);
                let (outcome, redis) = self.beside_redis(run).await;
                let (mut operation, failure) = outcome?;
                // No clock that nobody sets runs across two processes; one that was set back counts for nothing.
                let before = Timestamp::now().duration_since(began);
                let took = Duration::try_from(before).unwrap_or_default().max(since.elapsed());
                self.learn_how_it_ended(&mut operation).await;
                self.close(state, operation, failure, redis, took)?;
            }
            // People, the health endpoint and SIGTERM come first meanwhile, and the history does not grow by a try a millisecond.
            Action::FailOver { .. } if now < self.not_again_before => return Ok(false),
            Action::FailOver { target, reason } => {
                tracing::error!(target, reason, "failing over");
                let question = Question { target: target.clone(), ..Question::default() };
                let id = new_id();
                let entry = self
                    .change(
                        state,
                        &question,
                        Kind::Unplanned,
                        id,
                        change::AUTOMATIC.into(),
                        reason.clone(),
                        Some(0),
                    )
                    .await?;
                let fenced = entry.success || entry.operation.completed >= Step::Fence;
                self.remote.watched.revise(|view| {
                    view.failed_fences = if fenced { 0 } else { view.failed_fences.saturating_add(1) };
                });
                if !entry.success {
                    self.not_again_before = self.remote.watched.now() + PAUSE;
                    return Ok(false);
                }
            }
            _ => self.send(state, action, orders)?,
        }
        Ok(true)
    }

    /// Starts an order of the upkeep.
    fn send(&self, state: &mut State, action: Action, orders: &mut JoinSet<Done>) -> anyhow::Result<()> {
        if upkeep::before(state, &action, Timestamp::now()) {
            self.remote.save(state)?;
        }
        let Some((node, order, limit)) = upkeep::order(state, &action, &self.rules) else {
            tracing::warn!(?action, epoch = state.epoch, "written down");
            return Ok(());
        };
        tracing::info!(?action, node, epoch = state.epoch, "upkeep");
        self.remote.watched.note(&node, |seen| seen.busy = true);
        let (remote, epoch, primary) = (self.remote.clone(), state.epoch, state.primary.clone());
        // It streams through the node's slot, which a DBA may have dropped, and one adopted as primary never had: leading
        // already, the primary only makes what is missing. And pg_rewind goes by the source's last checkpoint, which right after
        // a promotion is of the old timeline.
        let watched = &self.remote.watched;
        let alive = watched.view().condition(&primary, watched.now(), &self.rules.policy) == Condition::Alive;
        let first = match &action {
            Action::Rejoin { how: Rejoin::Rewind, .. } => {
                vec![upkeep::lead(state, &self.rules, &primary), Order::Checkpoint]
            }
            // While there is no primary, a standby is started all the same: what it has can then be seen.
            Action::Rejoin { how: Rejoin::Follow, .. } if !alive => Vec::new(),
            Action::Rejoin { .. } => vec![upkeep::lead(state, &self.rules, &primary)],
            _ => Vec::new(),
        };
        orders.spawn(async move {
            let mut ready = Ok(());
            for order in first {
                if ready.is_ok() {
                    ready = remote.order(&primary, epoch, order, CHECKPOINT).await.map(drop);
                }
            }
            let result = match ready {
                Ok(()) => remote.order(&node, epoch, order, limit).await,
                Err(error) => Err(error),
            };
            Done { action, node, epoch, result }
        });
        Ok(())
    }

    fn came_back(&self, state: &mut State, done: Done) -> anyhow::Result<()> {
        let Done { action, node, epoch, result } = done;
        let now = self.remote.watched.now();
        let name = action.name();
        let outcome = if result.is_ok() { "done" } else { "failed" };
        self.metrics.actions.with_label_values(&[name, outcome]).inc();
        match result {
            Ok(status) => {
                tracing::info!(?action, node, "upkeep done");
                self.remote.watched.note(&node, |seen| {
                    seen.busy = false;
                    (seen.cure, seen.trouble, seen.tries) = (None, None, 0);
                });
                if let Action::Confirm { node: standby } = &action {
                    // How long it was missing before counts no more.
                    self.remote.watched.note(standby, |seen| seen.absent_for = Duration::ZERO);
                }
                if upkeep::after(state, &action, epoch, &status) {
                    self.remote.save(state)?;
                    self.remote.passed(name);
                }
            }
            Err(error) => {
                tracing::warn!(?action, node, %error, "upkeep failed");
                // One that was overtaken by a newer order says nothing about its own way. Without a primary there was nothing to
                // stream from, so that the way was not at fault either; but nothing is tried again without a pause.
                let alone = self.remote.watched.view().condition(&state.primary, now, &self.rules.policy)
                    != Condition::Alive;
                let code = match &error {
                    OrderError::Refused { code, .. } => Some(*code),
                    _ => None,
                };
                let overtaken =
                    epoch != state.epoch || matches!(code, Some(Code::Superseded | Code::OldEpoch));
                self.remote.watched.note(&node, |seen| {
                    seen.busy = false;
                    if overtaken {
                        return;
                    }
                    seen.trouble = Some(error.to_string());
                    // Only who rejoins in vain waits longer and longer: what keeps commits going must not wait.
                    if alone || !matches!(action, Action::Rejoin { .. }) {
                        seen.not_before = now + PAUSE;
                        return;
                    }
                    seen.tries = seen.tries.saturating_add(1);
                    // Only what was said to be cured by a rewind or a copy: a full disk or a wrong password is not.
                    if let (Action::Rejoin { how, .. }, Some(code)) = (&action, code)
                        && let Some(cure) = code.cure(*how)
                    {
                        seen.cure = Some(cure);
                        seen.tries = 1;
                    }
                    seen.not_before = now + pause(seen.tries);
                });
            }
        }
        Ok(())
    }

    async fn answer(&mut self, state: &mut State, asked: Asked) -> anyhow::Result<()> {
        match asked {
            Asked::Adopt { question, id, actor, reply } => {
                let adopted = self.adopt(Some(state.clone()), &question, id, actor)?;
                let answer = adopted.map(|(next, entry)| {
                    *state = next;
                    Box::new(entry)
                });
                drop(reply.send(answer));
            }
            Asked::Discard { region, reason, id, actor, reply } => {
                let answer = self.discard(state, &region, reason, id, actor)?;
                drop(reply.send(answer.map(Box::new)));
            }
            Asked::Mode { mode, reply } => {
                if state.mode != mode {
                    tracing::warn!(?mode, "mode changed");
                    state.mode = mode;
                    self.remote.save(state)?;
                }
                drop(reply.send(state.clone()));
            }
            Asked::Change { question, answered, id, actor, reply } => {
                let watched = &self.remote.watched;
                let verdict = checks::judge(&question, state, &watched.view(), &self.rules, watched.now());
                let answer = match verdict.outcome {
                    Err(denied) => Err(denied),
                    Ok(kind) => {
                        if let Some(answered) = answered {
                            state.remember(answered);
                        }
                        let reason = "asked for".to_owned();
                        Ok(Box::new(
                            self.change(state, &question, kind, id, actor, reason, verdict.bytes_at_risk)
                                .await?,
                        ))
                    }
                };
                // Whoever asked may be gone; the answer is in the history.
                drop(reply.send(answer));
            }
        }
        Ok(())
    }

    fn show(&self, state: &State, said: &mut Vec<String>) {
        let watched = &self.remote.watched;
        let (view, now) = (watched.view(), watched.now());
        let mut alarms = report::alarms(state, &view, &self.rules, now);
        alarms.extend(self.remote.alarm());
        let doubts = view.doubts(state, now, &self.rules.policy).len();
        alarms.extend_from_slice(&self.redis_seen.borrow().alarms);
        for alarm in alarms.iter().filter(|alarm| !said.contains(alarm)) {
            tracing::error!(alarm, "alarm");
        }
        for alarm in said.iter().filter(|alarm| !alarms.contains(alarm)) {
            tracing::info!(alarm, "alarm is over");
        }
        self.metrics.show(state, &report::nodes(state, &view, &self.rules, now), alarms.len(), doubts);
        *said = alarms;
        match view.condition(&state.primary, now, &self.rules.policy) {
            Condition::Alive => self.ready.up(),
            found => self.ready.down(format!("the primary {}: {}", state.primary, report::condition(&found))),
        }
    }
}

/// Between two tries; twice as long after each that failed, up to half a minute.
fn pause(tries: u32) -> Duration {
    (PAUSE * 2_u32.saturating_pow(tries.saturating_sub(1).min(6))).min(LONGEST)
}

/// An id nobody else has.
#[must_use]
pub fn new_id() -> String {
    let (high, low): (u64, u64) = (rand::random(), rand::random());
    format!("{high:016x}{low:016x}")
}

/// Steps a person would see in a plan.
#[must_use]
pub fn planned_steps(kind: Kind, waits: bool) -> Vec<String> {
    crate::journal::plan(kind, waits).into_iter().map(Step::name).map(str::to_owned).collect()
}
