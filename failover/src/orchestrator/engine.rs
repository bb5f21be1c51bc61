//! The one task that owns the state: looks, decides, acts, and answers what people ask.
//!
//! A change of the primary is carried out here and nothing else meanwhile; upkeep runs beside it, one order per node
//! at a time, and an answer that was overtaken by a change of the epoch counts for nothing.

mod change;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use service::health::Dependency;
use service::traces::Tracer;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::decide::{Action, Rules, decide};
use crate::hands::{Hands, OrderError};
use crate::history::{Entry, History};
use crate::operation::{self, Kind, Step};
use crate::orchestrator::checks::{self, Denied, Question};
use crate::orchestrator::metrics::Metrics;
use crate::orchestrator::redis::Redis;
use crate::orchestrator::remote::Remote;
use crate::orchestrator::{report, start};
use crate::protocol::{Node, NodeStatus, Order, Rejoin, UNREAD};
use crate::state::{Answered, Mode, State};
use crate::upkeep;
use crate::view::Condition;

/// Time alone can be a reason to act.
const TICK: Duration = Duration::from_millis(50);
/// After an order that failed; doubled after each further failure of a rejoin by its next, stronger way.
const PAUSE: Duration = Duration::from_millis(500);
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
    pub metrics: Metrics,
    /// Is told of each change of the primary.
    pub tracer: Tracer,
    pub asked: mpsc::Receiver<Asked>,
    pub ready: Dependency,
    /// After a failover that failed none begins by itself before this time of the watch.
    pub not_again_before: Duration,
}

impl Engine {
    /// Runs until the token is cancelled.
    ///
    /// # Errors
    /// When the state can no longer be made durable: nothing may be done then.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let found = self.remote.store().load()?;
        let mut state = match found {
            Some(state) => {
                tracing::info!(
                    primary = state.primary,
                    epoch = state.epoch,
                    operation = state.operation.is_some(),
                    "state found"
                );
                self.remote.found(&state);
                state
            }
            None => match self.first(&shutdown).await? {
                Some(state) => state,
                None => return Ok(()),
            },
        };
        let mut orders: JoinSet<Done> = JoinSet::new();
        let mut alarms = Vec::new();
        loop {
            while !shutdown.is_cancelled() && self.step(&mut state, &mut orders).await? {}
            self.show(&state, &mut alarms);
            let watched = self.remote.watched.clone();
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = watched.changed.notified() => {}
                () = tokio::time::sleep(TICK) => {}
                Some(done) = orders.join_next() => {
                    self.came_back(&mut state, done.context("an order's task failed")?)?;
                }
                Some(asked) = self.asked.recv() => self.answer(&mut state, asked).await?,
            }
        }
    }

    async fn first(&self, shutdown: &CancellationToken) -> anyhow::Result<Option<State>> {
        let watched = &self.remote.watched;
        let mut said = String::new();
        loop {
            match start::first_state(&watched.view(), &self.rules, &self.first_primary, watched.now()) {
                Ok(state) => {
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
            }
        }
    }

    /// Does the most urgent thing; false when there is none.
    async fn step(&mut self, state: &mut State, orders: &mut JoinSet<Done>) -> anyhow::Result<bool> {
        let watched = &self.remote.watched;
        let now = watched.now();
        let view = watched.revise(|view| {
            view.note_absence(&state.primary, now, &self.rules.policy);
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
                        "automatic".into(),
                        reason.clone(),
                        Some(0),
                    )
                    .await?;
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
        if upkeep::before(state, &action) {
            self.remote.save(state)?;
        }
        let Some((node, order, limit)) = upkeep::order(state, &action, &self.rules) else { return Ok(()) };
        tracing::info!(?action, node, epoch = state.epoch, "upkeep");
        self.remote.watched.note(&node, |seen| seen.busy = true);
        let (remote, epoch, primary) = (self.remote.clone(), state.epoch, state.primary.clone());
        let first = match &action {
            // pg_rewind goes by the source's last checkpoint, which right after a promotion is of the old timeline.
            Action::Rejoin { how: Rejoin::Rewind, .. } => Some(Order::Checkpoint),
            // A clone streams through the node's slot: leading already, the primary only makes what is missing.
            Action::Rejoin { how: Rejoin::Clone, .. } => Some(Order::Lead {
                wait_for: state.wait_for.clone(),
                slots: upkeep::slots(&self.rules, &primary),
                above: state.above,
            }),
            _ => None,
        };
        orders.spawn(async move {
            let ready = match first {
                Some(order) => remote.order(&primary, epoch, order, CHECKPOINT).await.map(drop),
                None => Ok(()),
            };
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
        let name = format!("{action:?}").split([' ', '{']).next().unwrap_or_default().to_lowercase();
        let outcome = if result.is_ok() { "done" } else { "failed" };
        self.metrics.actions.with_label_values(&[name.as_str(), outcome]).inc();
        match result {
            Ok(status) => {
                tracing::info!(?action, node, "upkeep done");
                self.remote.watched.note(&node, |seen| {
                    seen.busy = false;
                    if matches!(action, Action::Rejoin { .. }) {
                        seen.failed = None;
                    }
                });
                if upkeep::after(state, &action, epoch, &status) {
                    self.remote.save(state)?;
                    self.remote.passed(&name);
                }
            }
            Err(error) => {
                tracing::warn!(?action, node, %error, "upkeep failed");
                // One that was overtaken by a newer order says nothing about its own way. Without a primary there was nothing to
                // stream from, so that the way was not at fault either; but nothing is tried again without a pause.
                let alone = self.remote.watched.view().condition(&state.primary, now, &self.rules.policy)
                    != Condition::Alive;
                // Nor is it for one that does not read its configuration: no rewind mends that.
                let unread = matches!(&error, OrderError::Refused { code, .. } if code == UNREAD);
                let overtaken = epoch != state.epoch
                    || matches!(&error, OrderError::Refused { code, .. } if code == "superseded" || code == "old_epoch");
                self.remote.watched.note(&node, |seen| {
                    seen.busy = false;
                    if let (Action::Rejoin { how, .. }, OrderError::Refused { code, .. }, false) =
                        (&action, &error, overtaken || alone || unread)
                    {
                        // Nothing but a clone brings WAL back.
                        seen.failed = Some(if code == "wal_gone" { Rejoin::Rewind.max(*how) } else { *how });
                    }
                    if !overtaken {
                        seen.not_before = now + PAUSE;
                    }
                });
            }
        }
        Ok(())
    }

    async fn answer(&mut self, state: &mut State, asked: Asked) -> anyhow::Result<()> {
        match asked {
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
        let alarms = report::alarms(state, &view, &self.rules, now);
        for alarm in alarms.iter().filter(|alarm| !said.contains(alarm)) {
            tracing::error!(alarm, "alarm");
        }
        for alarm in said.iter().filter(|alarm| !alarms.contains(alarm)) {
            tracing::info!(alarm, "alarm is over");
        }
        self.metrics.show(state, &report::nodes(state, &view, &self.rules, now), alarms.len());
        *said = alarms;
        match view.condition(&state.primary, now, &self.rules.policy) {
            Condition::Alive => self.ready.up(),
            found => self.ready.down(format!("the primary {}: {}", state.primary, report::condition(&found))),
        }
    }
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
    operation::plan(kind, waits).into_iter().map(Step::name).map(str::to_owned).collect()
}
