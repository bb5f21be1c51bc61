//! How each step of an operation is carried out, and how one is undone.
//!
//! A step may be repeated after a crash: every order names the state to reach.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use failover_api::{Kind, Lsn, Node, StepStatus};
use futures_util::StreamExt;
use futures_util::future::{Either, join_all, select};
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use tokio::time::{Instant, timeout_at};

use crate::decide::holds;
use crate::journal::{Operation, Step};
use crate::node_control::{NodeControl, OrderError};
use crate::protocol::{NodeStatus, Order, Rejoin, Stop, Upstream, millis};
use crate::state::State;

/// An answer that must come at once: to detach, to promote.
const SWIFT: Duration = Duration::from_secs(3);
/// A checkpoint ahead of a planned stop, which nobody waits for.
const CHECKPOINT: Duration = Duration::from_secs(120);
/// A fast stop: writers wait from here on. One that takes longer ends like the loss of the source: all of it in under 5 s.
const STOP: Duration = Duration::from_millis(2500);
/// To start the old primary again.
const RESTORE: Duration = Duration::from_secs(5);
/// To bring the decided target into office.
const PROMOTE: Duration = Duration::from_secs(30);
/// The fence holds once one member of the sync set is detached. Others that answer within this time are kept; writers
/// do not wait for one that hangs.
const GRACE: Duration = Duration::from_millis(250);
const RETRY: Duration = Duration::from_millis(20);

pub(super) async fn carry_out<H: NodeControl>(
    hands: &H,
    state: &mut State,
    operation: &mut Operation,
    step: Step,
) -> Result<String, String> {
    let epoch = state.epoch;
    match step {
        Step::Journal => Ok(String::new()),
        Step::Prepare => {
            // The first writes what has gathered, the second what came meanwhile, so that the stop's own is short.
            for _ in 0..2 {
                let source = &operation.source;
                let status = hands.order(source, epoch, Order::Checkpoint, CHECKPOINT).await.map_err(text)?;
                operation.acknowledged = operation.acknowledged.max(status.acknowledged);
                // Somebody may have had its commits wait for nobody, or for a stranger, since these were confirmed.
                let holds = |node: &Node| status.sample.as_ref().is_some_and(|sample| holds(sample, node));
                let left_out: Vec<Node> =
                    state.sync_set.iter().filter(|node| !holds(node)).cloned().collect();
                if !left_out.is_empty() {
                    // Undoing it makes them wait again, and what was acknowledged meanwhile would be forgotten.
                    left_out.iter().for_each(|node| state.distrust(node));
                    return Err(format!(
                        "commits of {source} do not wait for {}, whatever was ordered; try again in a moment",
                        left_out.join(", ")
                    ));
                }
            }
            Ok(format!("checkpoint on {}", operation.source))
        }
        Step::Fence if operation.kind == Kind::Planned => stop_source(hands, epoch, operation).await,
        Step::Fence => fence(hands, epoch, operation).await,
        Step::Decide => Ok(format!("{} is the primary of record", operation.target)),
        Step::Promote => promote(hands, epoch, operation).await,
        Step::Repoint => repoint(hands, state, operation).await,
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

/// Planned: a fast stop with the target attached. What it wrote last is the shutdown checkpoint; the target must have it. A stop
/// that does not end (somebody who archives and never confirms the last bit keeps it waiting), or a source that is lost on
/// the way, ends like an unplanned failover: the target has everything that was acknowledged.
async fn stop_source<H: NodeControl>(
    hands: &H,
    epoch: u64,
    operation: &mut Operation,
) -> Result<String, String> {
    let source = operation.source.clone();
    let status = match hands.order(&source, epoch, Order::Halt { how: Stop::Fast }, STOP).await {
        Ok(status) => status,
        Err(error) if operation.sync_set_before.contains(&operation.target) => {
            operation.kind = Kind::Unplanned;
            let held = fence(hands, epoch, operation).await?;
            return Ok(format!("{source} did not stop in time ({error}); {held}"));
        }
        Err(error) => return Err(error.to_string()),
    };
    let control = status.control.filter(|control| control.state == "shut down" && !control.standby);
    let Some(control) = control else { return Err(format!("{source} did not shut down cleanly")) };
    operation.source_lsn = Some(control.checkpoint);
    operation.timeline_before = operation.timeline_before.max(control.timeline);
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
async fn fence<H: NodeControl>(hands: &H, epoch: u64, operation: &mut Operation) -> Result<String, String> {
    let forced = operation.kind == Kind::Forced;
    let halt = hands.order(&operation.source, epoch, Order::Halt { how: Stop::Immediate }, SWIFT);
    let detach = detach(hands, epoch, operation);
    // The source is asked to stop too, and not waited for: its standbys' word is enough.
    let (detached, halted) = match select(Box::pin(detach), Box::pin(halt)).await {
        Either::Left((detached, halt)) if forced => (detached, Some(halt.await)),
        Either::Left((detached, _)) => (detached, None),
        Either::Right((halted, detach)) => (detach.await, Some(halted)),
    };
    let stopped = halted.is_some_and(|halted| halted.is_ok_and(|status| status.is_stopped()));
    let (mut reached, mut timelines) = (BTreeMap::new(), BTreeMap::new());
    let mut problems = Vec::new();
    for (node, answer) in detached {
        match answer {
            Ok(status) => match received(&status) {
                // Whatever it is called, it has not acknowledged what its primary was told. It may still be reading its own WAL.
                Some(lsn) if lsn < operation.acknowledged && !forced => problems.push(format!(
                    "{node} has {lsn}, but {} was acknowledged by {}",
                    operation.acknowledged, operation.source
                )),
                Some(lsn) => {
                    timelines.insert(node.clone(), status.timeline());
                    reached.insert(node, lsn);
                }
                None => problems.push(format!("{node} does not run")),
            },
            Err(error) => problems.push(error.to_string()),
        }
    }
    let best = reached
        .iter()
        .filter(|(node, _)| operation.sync_set_before.contains(*node))
        .max_by_key(|(node, lsn)| (**node == operation.target, **lsn))
        .map(|(node, lsn)| (node.clone(), *lsn));
    let chosen = match (&best, forced) {
        (Some(best), false) => best.clone(),
        (None, false) => {
            return Err(format!("no member of the sync set could be detached: {}", problems.join("; ")));
        }
        (_, true) => match reached.get(&operation.target) {
            Some(lsn) => (operation.target.clone(), *lsn),
            None => {
                return Err(format!("{} could not be detached: {}", operation.target, problems.join("; ")));
            }
        },
    };
    operation.target_lsn = Some(chosen.1);
    // Positions can be compared within one history only.
    let behind = reached.iter().filter(|(node, lsn)| {
        **node != chosen.0 && **lsn <= chosen.1 && timelines.get(*node) == timelines.get(&chosen.0)
    });
    operation.behind = behind.map(|(node, _)| node.clone()).collect();
    keep(operation, &chosen.0, &reached);
    let held = if stopped {
        format!("{} is stopped", operation.source)
    } else if best.is_some() {
        format!("{} can acknowledge nothing: its standby is detached", operation.source)
    } else if operation.sync_set_before.is_empty() {
        format!(
            "{} could not be reached and was waiting for nobody: IT MAY STILL ACKNOWLEDGE",
            operation.source
        )
    } else {
        format!(
            "neither {} nor those it waits for could be reached: IT MAY STILL ACKNOWLEDGE",
            operation.source
        )
    };
    Ok(format!("{held}; {} has {}", operation.target, operation.target_lsn.unwrap_or_default()))
}

/// Orders all standbys to detach, at once. Ends when all have answered, or a moment after the fence holds.
async fn detach<H: NodeControl>(
    hands: &H,
    epoch: u64,
    operation: &Operation,
) -> Vec<(Node, Result<NodeStatus, OrderError>)> {
    let mut orders: FuturesUnordered<_> = operation
        .standbys
        .iter()
        .map(|node| async move { (node.clone(), hands.order(node, epoch, Order::Detach, SWIFT).await) })
        .collect();
    let (mut answers, mut until) = (Vec::new(), None);
    loop {
        let answer = match until {
            Some(until) => timeout_at(until, orders.next()).await.ok().flatten(),
            None => orders.next().await,
        };
        let Some((node, answer)) = answer else { break };
        // A forced one may concern a node that nobody waits for: then only everybody's answer makes a fence.
        let suffices = operation.kind != Kind::Forced && operation.sync_set_before.contains(&node);
        if suffices && answer.as_ref().is_ok_and(|status| received(status).is_some()) {
            until = until.or(Some(Instant::now() + GRACE));
        }
        answers.push((node, answer));
    }
    let silent: Vec<Node> =
        operation.standbys.iter().filter(|node| answers.iter().all(|(a, _)| a != *node)).cloned().collect();
    answers.extend(silent.into_iter().map(|node| {
        let reason = format!("not within {} ms of the others", millis(GRACE));
        (node.clone(), Err(OrderError::Silent { node, reason }))
    }));
    answers
}

/// Goes on with `chosen` and the standbys that were reached. For the others the upkeep has better means; nobody waits for
/// them, unless two copies are demanded and nobody else is left to hold the second.
fn keep(operation: &mut Operation, chosen: &str, reached: &BTreeMap<Node, Lsn>) {
    let before = std::mem::replace(&mut operation.target, chosen.to_owned());
    let mut waits = operation.wait_for_after.clone();
    if before != chosen && waits.remove(chosen) {
        waits.insert(before);
    }
    let standbys = std::mem::take(&mut operation.standbys);
    let (kept, lost): (BTreeSet<Node>, _) = standbys.into_iter().partition(|node| reached.contains_key(node));
    let held: BTreeSet<Node> = waits.difference(&lost).cloned().collect();
    operation.standbys = kept;
    operation.wait_for_after = if held.is_empty() && operation.two_copies { waits } else { held };
}

async fn promote<H: NodeControl>(hands: &H, epoch: u64, operation: &mut Operation) -> Result<String, String> {
    let target = operation.target.clone();
    let slots: BTreeSet<Node> = operation.addresses.keys().filter(|node| **node != target).cloned().collect();
    let wait_for = operation.wait_for_after.clone();
    let above = operation.timeline_before;
    let order = || Order::Promote { wait_for: wait_for.clone(), slots: slots.clone(), above };
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
/// left to the upkeep, which has better means; commits do not wait for it meanwhile.
async fn repoint<H: NodeControl>(
    hands: &H,
    state: &mut State,
    operation: &mut Operation,
) -> Result<String, String> {
    let Some(upstream) = operation.addresses.get(&operation.target) else {
        return Err(format!("the address of {} is not known", operation.target));
    };
    let planned = (operation.kind == Kind::Planned).then_some(&operation.source);
    let nodes = operation.standbys.iter().filter(|node| **node != operation.target).chain(planned);
    let epoch = state.epoch;
    let answers = join_all(nodes.map(|node| {
        let order = stand(operation, upstream, node);
        async move { (node.clone(), hands.order(node, epoch, order, SWIFT).await) }
    }))
    .await;
    let mut details = Vec::new();
    let mut lost = Vec::new();
    for (node, answer) in answers {
        match answer {
            Ok(_) => details.push(format!("{node} streams from {}", operation.target)),
            Err(error) => {
                details.push(format!("{node} will be brought back by the upkeep ({error})"));
                lost.push(node);
            }
        }
    }
    lost.retain(|node| {
        let last = operation.wait_for_after.len() == 1;
        !(last && operation.two_copies) && operation.wait_for_after.remove(node)
    });
    if !lost.is_empty() {
        lost.iter().for_each(|node| state.shrink(node));
        state.operation = Some(operation.clone());
        // Durable before the primary is told.
        hands.save(state).map_err(|error| format!("{error:#}"))?;
        let order = || Order::WaitFor { nodes: state.wait_for.clone() };
        insist(hands, &operation.target, state.epoch, order).await?;
        details.push(format!("commits do not wait for {}", lost.join(", ")));
    }
    Ok(if details.is_empty() {
        format!("{} will rejoin by itself", operation.source)
    } else {
        details.join("; ")
    })
}

async fn validate<H: NodeControl>(
    hands: &H,
    epoch: u64,
    operation: &mut Operation,
) -> Result<String, String> {
    let order = || Order::Promote {
        wait_for: operation.wait_for_after.clone(),
        slots: operation.addresses.keys().filter(|node| **node != operation.target).cloned().collect(),
        above: operation.timeline_before,
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
async fn insist<H: NodeControl>(
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
pub(super) async fn undo<H: NodeControl>(
    hands: &H,
    state: &mut State,
    operation: &mut Operation,
) -> anyhow::Result<String> {
    let started = Instant::now();
    state.epoch += 1;
    state.operation = Some(operation.clone());
    hands.save(state)?;
    // Also one that became unplanned on the way has been told to stop.
    let planned = operation.kind == Kind::Planned || operation.completed == Step::Prepare;
    if !planned || operation.completed < Step::Prepare && operation.steps.len() < 2 {
        let detail = "nothing was changed that the upkeep does not put back".to_owned();
        operation.record("undo", Timestamp::now(), started.elapsed(), StepStatus::RolledBack, detail.clone());
        return Ok(detail);
    }
    let lead = Order::Promote {
        wait_for: state.wait_for.clone(),
        slots: operation.addresses.keys().filter(|node| **node != operation.source).cloned().collect(),
        above: state.above,
    };
    let mut details = Vec::new();
    match hands.order(&operation.source, state.epoch, lead, RESTORE).await {
        Ok(_) => details.push(format!("{} is the writable primary again", operation.source)),
        Err(error) => details.push(format!("{} is to be started by the upkeep ({error})", operation.source)),
    }
    if let Some(upstream) = operation.addresses.get(&operation.source) {
        let order = stand(operation, upstream, &operation.target);
        match hands.order(&operation.target, state.epoch, order, SWIFT).await {
            Ok(_) => details.push(format!("{} streams from it", operation.target)),
            Err(error) => {
                details.push(format!("{} is to be brought back by the upkeep ({error})", operation.target))
            }
        }
    }
    operation.record("undo", Timestamp::now(), started.elapsed(), StepStatus::RolledBack, details.join("; "));
    Ok(details.join("; "))
}

fn stand(operation: &Operation, upstream: &Upstream, node: &str) -> Order {
    let slots = operation.addresses.keys().filter(|other| *other != node).cloned().collect();
    let leads = operation.timeline_before + 1;
    Order::Follow { upstream: upstream.clone(), how: Rejoin::Follow, slots, leads, discarded: false }
}

fn received(status: &NodeStatus) -> Option<Lsn> {
    status.sample.as_ref().filter(|sample| sample.in_recovery).map(|sample| sample.lsn)
}
