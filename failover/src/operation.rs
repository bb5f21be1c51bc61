//! One change of the primary: its steps as data, and how they are carried out.
//!
//! Every completed step is durable before the next begins. Until [`Step::Decide`] nothing has happened that cannot be
//! undone, and an operation found in the journal there is abandoned; from there on it is always finished, since the
//! target may have been promoted and may have acknowledged. Nothing here waits for the old primary unless it is
//! known to live.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use crate::hands::{Hands, OrderError};
use crate::lsn::Lsn;
use crate::protocol::{Node, NodeStatus, Order, Rejoin, Stop, Upstream, millis};
use crate::state::State;

/// An answer that must come at once: to detach, to promote.
const SWIFT: Duration = Duration::from_secs(3);
/// A checkpoint ahead of a planned stop, which nobody waits for.
const CHECKPOINT: Duration = Duration::from_secs(120);
/// A fast stop: writers wait from here on. Longer, and the old primary is better left in charge.
const STOP: Duration = Duration::from_secs(10);
/// To bring the decided target into office.
const PROMOTE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The source lives and takes part.
    Planned,
    /// The source is gone; the target holds every acknowledged commit.
    Unplanned,
    /// The operator accepts the loss of what the target does not have.
    Forced,
}

/// The steps, in the order of [`plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The operation is in the journal.
    Journal,
    /// Checkpoint on the source, so that its stop is short.
    Prepare,
    /// From here on the source cannot acknowledge.
    Fence,
    /// The target is the primary, durably. No way back.
    Decide,
    Promote,
    /// The other standbys follow the new primary.
    Repoint,
    /// A row that carries the epoch is committed.
    Mark,
    Validate,
}

impl Step {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Journal => "journal",
            Self::Prepare => "prepare",
            Self::Fence => "fence",
            Self::Decide => "decide",
            Self::Promote => "promote",
            Self::Repoint => "repoint",
            Self::Mark => "mark",
            Self::Validate => "validate",
        }
    }
}

/// What is done, in this order. When commits will wait for a standby, that one is repointed before the first commit;
/// else the first commit comes first.
#[must_use]
pub fn plan(kind: Kind, waits: bool) -> Vec<Step> {
    let mut steps = vec![Step::Journal];
    if kind == Kind::Planned {
        steps.push(Step::Prepare);
    }
    steps.extend([Step::Fence, Step::Decide, Step::Promote]);
    steps.extend(if waits { [Step::Repoint, Step::Mark] } else { [Step::Mark, Step::Repoint] });
    steps.push(Step::Validate);
    steps
}

/// How one step went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StepRecord {
    pub number: u32,
    pub action: String,
    pub duration_ms: f64,
    /// `done`, `failed` or `rolled_back`.
    pub status: String,
    pub detail: String,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    pub id: String,
    pub kind: Kind,
    pub target: Node,
    pub actor: String,
    pub reason: String,
    pub started_at: Timestamp,
    /// Whom the new primary waits for.
    pub wait_for: BTreeSet<Node>,
    /// Standbys that can be reached: detached before the decision, repointed after it.
    pub standbys: BTreeSet<Node>,
    pub addresses: BTreeMap<Node, Upstream>,
    /// Timeline and last acknowledged marker of the source, as last seen.
    pub timeline: u32,
    pub marker: u64,
    pub bytes_at_risk: u64,
    /// See [`Order::Stand`].
    pub guard: bool,
}

/// In the journal while under way, in the history afterwards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    pub id: String,
    pub kind: Kind,
    pub epoch: u64,
    pub source: Node,
    pub target: Node,
    pub actor: String,
    pub reason: String,
    #[schema(value_type = String)]
    pub started_at: Timestamp,
    /// The last step that was completed.
    pub completed: Step,
    pub steps: Vec<StepRecord>,
    pub sync_set_before: BTreeSet<Node>,
    pub wait_for_after: BTreeSet<Node>,
    pub standbys: BTreeSet<Node>,
    pub addresses: BTreeMap<Node, Upstream>,
    pub timeline_before: u32,
    pub timeline_after: u32,
    pub source_lsn: Option<Lsn>,
    pub target_lsn: Option<Lsn>,
    pub bytes_at_risk: u64,
    pub guard: bool,
    pub marker_before: u64,
    pub marker_after: u64,
    /// From the moment the source was known to be down, or was asked to stop, until the first commit on the target.
    pub write_gap_ms: Option<f64>,
}

/// The step that failed, and what was undone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub step: Step,
    pub error: String,
    pub rolled_back: String,
}

impl Operation {
    #[must_use]
    pub fn new(request: Request, state: &State) -> Self {
        Self {
            id: request.id,
            kind: request.kind,
            epoch: state.epoch + 1,
            source: state.primary.clone(),
            target: request.target,
            actor: request.actor,
            reason: request.reason,
            started_at: request.started_at,
            completed: Step::Journal,
            steps: Vec::new(),
            sync_set_before: state.sync_set.clone(),
            wait_for_after: request.wait_for,
            standbys: request.standbys,
            addresses: request.addresses,
            timeline_before: request.timeline,
            timeline_after: 0,
            source_lsn: None,
            target_lsn: None,
            bytes_at_risk: request.bytes_at_risk,
            guard: request.guard,
            marker_before: request.marker,
            marker_after: 0,
            write_gap_ms: None,
        }
    }

    /// The point of no return lies behind.
    #[must_use]
    pub fn is_decided(&self) -> bool {
        self.completed >= Step::Decide
    }

    fn record(&mut self, action: &str, started: Instant, status: &str, detail: String) {
        let number = u32::try_from(self.steps.len()).unwrap_or(u32::MAX).saturating_add(1);
        let duration_ms = started.elapsed().as_secs_f64() * 1000.0;
        self.steps.push(StepRecord {
            number,
            action: action.into(),
            duration_ms,
            status: status.into(),
            detail,
        });
    }
}

/// Journals a new operation and carries it out. `since` is when writers began to wait.
///
/// # Errors
/// Only when state cannot be saved: then nothing more may be done.
pub async fn begin<H: Hands>(
    hands: &H,
    state: &mut State,
    request: Request,
    since: Instant,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    let started = Instant::now();
    let mut operation = Operation::new(request, state);
    operation.record(Step::Journal.name(), started, "done", format!("epoch {}", operation.epoch));
    state.epoch = operation.epoch;
    state.operation = Some(operation.clone());
    hands.save(state)?;
    hands.passed(Step::Journal.name());
    carry_on(hands, state, operation, since).await
}

/// What a restart does with an operation found in the journal.
///
/// # Errors
/// As [`begin`].
pub async fn resume<H: Hands>(
    hands: &H,
    state: &mut State,
    operation: Operation,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    if operation.is_decided() {
        return carry_on(hands, state, operation, Instant::now()).await;
    }
    let mut operation = operation;
    let step = operation.completed;
    let rolled_back = undo(hands, state, &mut operation).await?;
    let error = "the orchestrator was restarted before the decision".into();
    Ok((operation, Some(Failure { step, error, rolled_back })))
}

async fn carry_on<H: Hands>(
    hands: &H,
    state: &mut State,
    mut operation: Operation,
    since: Instant,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    let steps = plan(operation.kind, !operation.wait_for_after.is_empty());
    let at = steps.iter().position(|step| *step == operation.completed).map_or(0, |at| at + 1);
    let mut since = since;
    for step in steps.into_iter().skip(at) {
        let started = Instant::now();
        if step == Step::Fence && operation.kind == Kind::Planned {
            // Until now the source went on acknowledging.
            since = started;
        }
        match carry_out(hands, state, &mut operation, step).await {
            Ok(detail) => {
                if step == Step::Mark {
                    operation.write_gap_ms = Some(since.elapsed().as_secs_f64() * 1000.0);
                }
                operation.record(step.name(), started, "done", detail);
                operation.completed = step;
                if step == Step::Decide {
                    state.hand_over(&operation.target, operation.wait_for_after.clone());
                }
                state.operation = Some(operation.clone());
                hands.save(state)?;
                hands.passed(step.name());
            }
            Err(error) => {
                operation.record(step.name(), started, "failed", error.clone());
                let rolled_back = if operation.is_decided() {
                    format!(
                        "nothing: {} stays the primary of record and is brought into office",
                        operation.target
                    )
                } else {
                    undo(hands, state, &mut operation).await?
                };
                return Ok((operation, Some(Failure { step, error, rolled_back })));
            }
        }
    }
    Ok((operation, None))
}

async fn carry_out<H: Hands>(
    hands: &H,
    state: &State,
    operation: &mut Operation,
    step: Step,
) -> Result<String, String> {
    let epoch = state.epoch;
    match step {
        Step::Journal => Ok(String::new()),
        Step::Prepare => {
            // The first writes what has gathered, the second what came meanwhile, so that the stop's own is short.
            for _ in 0..2 {
                hands.order(&operation.source, epoch, Order::Checkpoint, CHECKPOINT).await.map_err(text)?;
            }
            Ok(format!("checkpoint on {}", operation.source))
        }
        Step::Fence if operation.kind == Kind::Planned => stop_source(hands, epoch, operation).await,
        Step::Fence => fence(hands, epoch, operation).await,
        Step::Decide => Ok(format!("{} is the primary of record", operation.target)),
        Step::Promote => promote(hands, epoch, operation).await,
        Step::Repoint => repoint(hands, epoch, operation).await,
        Step::Mark => {
            let order = || Order::Mark { epoch: operation.epoch };
            let status = insist(hands, &operation.target, epoch, order).await?;
            operation.marker_after = status.marker;
            Ok(format!("a row with epoch {} is committed on {}", operation.epoch, operation.target))
        }
        Step::Validate => validate(hands, epoch, operation).await,
    }
}

fn text(error: OrderError) -> String {
    error.to_string()
}

/// Planned: a fast stop with the target attached. What it wrote last is the shutdown checkpoint; the target must have it.
async fn stop_source<H: Hands>(hands: &H, epoch: u64, operation: &mut Operation) -> Result<String, String> {
    let source = operation.source.clone();
    let status = hands.order(&source, epoch, Order::Halt { how: Stop::Fast }, STOP).await.map_err(text)?;
    let control = status.control.filter(|control| control.state == "shut down" && !control.standby);
    let Some(control) = control else { return Err(format!("{source} did not shut down cleanly")) };
    operation.source_lsn = Some(control.checkpoint);
    operation.timeline_before = control.timeline;
    operation.marker_before = operation.marker_before.max(status.marker);
    let target = operation.target.clone();
    let status = hands.order(&target, epoch, Order::Detach, SWIFT).await.map_err(text)?;
    let received = received(&status).ok_or_else(|| format!("{target} does not run"))?;
    operation.target_lsn = Some(received);
    if received <= control.checkpoint {
        return Err(format!(
            "{target} has {received}, which is not past the last record of {source} at {}",
            control.checkpoint
        ));
    }
    Ok(format!("{source} is shut down at {}, {target} has everything up to {received}", control.checkpoint))
}

/// Unplanned: detach whoever the source could wait for. One member of the sync set is enough.
async fn fence<H: Hands>(hands: &H, epoch: u64, operation: &mut Operation) -> Result<String, String> {
    let forced = operation.kind == Kind::Forced;
    let halt = hands.order(&operation.source, epoch, Order::Halt { how: Stop::Immediate }, SWIFT);
    let detach = join_all(
        operation
            .standbys
            .iter()
            .map(|node| async move { (node.clone(), hands.order(node, epoch, Order::Detach, SWIFT).await) }),
    );
    // The source is asked to stop too, and not waited for: its standbys' word is enough.
    let (detached, halted) = match select(Box::pin(detach), Box::pin(halt)).await {
        Either::Left((detached, halt)) if forced => (detached, Some(halt.await)),
        Either::Left((detached, _)) => (detached, None),
        Either::Right((halted, detach)) => (detach.await, Some(halted)),
    };
    let stopped = halted.is_some_and(|halted| halted.is_ok_and(|status| status.is_stopped()));
    let mut reached = BTreeMap::new();
    let mut problems = Vec::new();
    for (node, answer) in detached {
        match answer {
            Ok(status) => match received(&status) {
                Some(lsn) => drop(reached.insert(node, lsn)),
                None => problems.push(format!("{node} does not run")),
            },
            Err(error) => problems.push(error.to_string()),
        }
    }
    let best = reached
        .iter()
        .filter(|(node, _)| operation.sync_set_before.contains(*node))
        .max_by_key(|(node, lsn)| (**node == operation.target, **lsn));
    match (best, forced) {
        (Some((node, lsn)), false) => {
            operation.target_lsn = Some(*lsn);
            if *node != operation.target && operation.wait_for_after.remove(node) {
                operation.wait_for_after.insert(operation.target.clone());
            }
            operation.target.clone_from(node);
        }
        (None, false) => {
            return Err(format!("no member of the sync set could be detached: {}", problems.join("; ")));
        }
        (_, true) => match reached.get(&operation.target) {
            Some(lsn) => operation.target_lsn = Some(*lsn),
            None => {
                return Err(format!("{} could not be detached: {}", operation.target, problems.join("; ")));
            }
        },
    }
    let held = if stopped {
        format!("{} is stopped", operation.source)
    } else if best.is_some() {
        format!("{} can acknowledge nothing: its standby is detached", operation.source)
    } else {
        format!(
            "{} could not be reached and was waiting for nobody: IT MAY STILL ACKNOWLEDGE",
            operation.source
        )
    };
    Ok(format!("{held}; {} has {}", operation.target, operation.target_lsn.unwrap_or_default()))
}

async fn promote<H: Hands>(hands: &H, epoch: u64, operation: &mut Operation) -> Result<String, String> {
    let target = operation.target.clone();
    let slots: BTreeSet<Node> = operation.addresses.keys().filter(|node| **node != target).cloned().collect();
    let wait_for = operation.wait_for_after.clone();
    let order = || Order::Lead { wait_for: wait_for.clone(), slots: slots.clone() };
    let status = insist(hands, &target, epoch, order).await?;
    let sample = status.sample.as_ref().filter(|_| status.is_writable());
    let Some(sample) = sample else { return Err(format!("{target} is not writable after its promotion")) };
    operation.timeline_after = sample.timeline;
    if sample.timeline <= operation.timeline_before {
        return Err(format!(
            "{target} is on timeline {}, not above {}",
            sample.timeline, operation.timeline_before
        ));
    }
    Ok(format!("{target} is writable on timeline {}", sample.timeline))
}

/// Others, and in a planned operation the old primary, become standbys of the target. What does not succeed at once is
/// left to the upkeep, which has better means.
async fn repoint<H: Hands>(hands: &H, epoch: u64, operation: &mut Operation) -> Result<String, String> {
    let Some(upstream) = operation.addresses.get(&operation.target) else {
        return Err(format!("the address of {} is not known", operation.target));
    };
    let planned = (operation.kind == Kind::Planned).then_some(&operation.source);
    let nodes = operation.standbys.iter().filter(|node| **node != operation.target).chain(planned);
    let order = Order::Stand { upstream: upstream.clone(), how: Rejoin::Follow, guard: operation.guard };
    let answers = join_all(nodes.map(|node| {
        let order = order.clone();
        async move { (node, hands.order(node, epoch, order, SWIFT).await) }
    }))
    .await;
    let details: Vec<String> = answers
        .into_iter()
        .map(|(node, answer)| match answer {
            Ok(_) => format!("{node} streams from {}", operation.target),
            Err(error) => format!("{node} will be brought back by the upkeep ({error})"),
        })
        .collect();
    Ok(if details.is_empty() {
        format!("{} will rejoin by itself", operation.source)
    } else {
        details.join("; ")
    })
}

async fn validate<H: Hands>(hands: &H, epoch: u64, operation: &mut Operation) -> Result<String, String> {
    let order = || Order::Lead {
        wait_for: operation.wait_for_after.clone(),
        slots: operation.addresses.keys().filter(|node| **node != operation.target).cloned().collect(),
    };
    // Leading already, it only answers.
    let status = insist(hands, &operation.target, epoch, order).await?;
    if !status.is_writable() {
        return Err(format!("{} is not writable", operation.target));
    }
    let marker = status.marker.max(operation.marker_after);
    operation.marker_after = marker;
    if operation.kind != Kind::Forced && marker < operation.marker_before {
        return Err(format!(
            "marker {marker} is on {}, but {} was acknowledged by {}",
            operation.target, operation.marker_before, operation.source
        ));
    }
    Ok(format!(
        "{} is writable, marker {marker} (acknowledged before: {})",
        operation.target, operation.marker_before
    ))
}

/// After the decision there is nobody else: try until it works or the time is up.
async fn insist<H: Hands>(
    hands: &H,
    node: &str,
    epoch: u64,
    order: impl Fn() -> Order,
) -> Result<NodeStatus, String> {
    let deadline = Instant::now() + PROMOTE;
    loop {
        match hands.order(node, epoch, order(), SWIFT).await {
            Ok(status) => return Ok(status),
            Err(error) if Instant::now() >= deadline => {
                return Err(format!("{error} (tried for {} ms)", millis(PROMOTE)));
            }
            Err(error) => tracing::warn!(%error, "tried again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Before the decision: back to where it was. The epoch grows, so that an order of ours still on its way is refused.
async fn undo<H: Hands>(hands: &H, state: &mut State, operation: &mut Operation) -> anyhow::Result<String> {
    let started = Instant::now();
    state.epoch += 1;
    state.operation = Some(operation.clone());
    hands.save(state)?;
    let planned = operation.kind == Kind::Planned;
    if !planned || operation.completed < Step::Prepare && operation.steps.len() < 2 {
        let detail = "nothing was changed that the upkeep does not put back".to_owned();
        operation.record("undo", started, "rolled_back", detail.clone());
        return Ok(detail);
    }
    let lead = Order::Lead {
        wait_for: state.wait_for.clone(),
        slots: operation.addresses.keys().filter(|node| **node != operation.source).cloned().collect(),
    };
    let mut details = Vec::new();
    match hands.order(&operation.source, state.epoch, lead, STOP).await {
        Ok(_) => details.push(format!("{} is the writable primary again", operation.source)),
        Err(error) => details.push(format!("{} is to be started by the upkeep ({error})", operation.source)),
    }
    if let Some(upstream) = operation.addresses.get(&operation.source) {
        let order = Order::Stand { upstream: upstream.clone(), how: Rejoin::Follow, guard: operation.guard };
        match hands.order(&operation.target, state.epoch, order, SWIFT).await {
            Ok(_) => details.push(format!("{} streams from it", operation.target)),
            Err(error) => {
                details.push(format!("{} is to be brought back by the upkeep ({error})", operation.target))
            }
        }
    }
    operation.record("undo", started, "rolled_back", details.join("; "));
    Ok(details.join("; "))
}

fn received(status: &NodeStatus) -> Option<Lsn> {
    status.sample.as_ref().filter(|sample| sample.in_recovery).map(|sample| sample.lsn)
}
