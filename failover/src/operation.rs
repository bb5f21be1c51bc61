//! One change of the primary: how its steps are carried out.
//!
//! Every completed step is durable before the next begins, but for the fence, which becomes so with the decision. Until
//! [`Step::Decide`] nothing has happened that cannot be undone, and an operation found in the journal there is
//! abandoned; from there on it is always finished, since the target may have been promoted and may have
//! acknowledged. Nothing here waits for the old primary unless it is known to live.

mod steps;
#[cfg(test)]
mod tests;

use failover_api::{Kind, StepStatus};
use jiff::Timestamp;
use tokio::time::Instant;

use crate::journal::{Failure, Operation, Request, Step, plan};
use crate::node_control::NodeControl;
use crate::state::State;
use steps::{carry_out, undo};

/// Journals a new operation and carries it out. `since` is when writers began to wait.
///
/// # Errors
/// Only when state cannot be saved: then nothing more may be done.
pub async fn begin<H: NodeControl>(
    hands: &H,
    state: &mut State,
    request: Request,
    since: Instant,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    let started = Instant::now();
    let mut operation = state.opened(request);
    operation.record(
        Step::Journal.name(),
        Timestamp::now(),
        started.elapsed(),
        StepStatus::Done,
        format!("epoch {}", operation.epoch),
    );
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
pub async fn resume<H: NodeControl>(
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

async fn carry_on<H: NodeControl>(
    hands: &H,
    state: &mut State,
    mut operation: Operation,
    since: Instant,
) -> anyhow::Result<(Operation, Option<Failure>)> {
    let steps = plan(operation.kind, operation.waits);
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
                operation.record(step.name(), Timestamp::now(), started.elapsed(), StepStatus::Done, detail);
                operation.completed = step;
                if step == Step::Decide {
                    let above = operation.timeline_before;
                    state.hand_over(&operation.target, operation.wait_for_after.clone(), above);
                    if operation.kind == Kind::Forced {
                        // Everybody else may have more, but for who was seen to have less.
                        let others =
                            operation.addresses.keys().filter(|node| !operation.behind.contains(*node));
                        for node in others.filter(|node| **node != operation.target) {
                            let reason = format!(
                                "{} was made primary by force ({}): {node} may have acknowledged readings that no other node has",
                                operation.target, operation.id
                            );
                            state.keep(node, reason, Timestamp::now());
                        }
                    }
                }
                if step == Step::Promote {
                    // A promotion that was cut short may have used numbers in between.
                    state.above = state.above.max(operation.timeline_after.saturating_sub(1));
                }
                state.operation = Some(operation.clone());
                // The decision follows at once and is made durable with it; until then both are undone alike.
                if step != Step::Fence {
                    hands.save(state)?;
                }
                hands.passed(step.name());
            }
            Err(error) => {
                if step == Step::Validate && operation.marker_after < operation.marker_before {
                    let reason = format!(
                        "{} has marker {}, and {} had acknowledged {}: what is missing may be in its data",
                        operation.target, operation.marker_after, operation.source, operation.marker_before
                    );
                    state.keep(&operation.source, reason, Timestamp::now());
                    state.operation = Some(operation.clone());
                    hands.save(state)?;
                }
                operation.record(
                    step.name(),
                    Timestamp::now(),
                    started.elapsed(),
                    StepStatus::Failed,
                    error.clone(),
                );
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
