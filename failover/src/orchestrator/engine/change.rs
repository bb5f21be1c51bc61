//! A change of the primary from question to history, and Redis beside it.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::Context;
use failover_api::{Copies, Kind, Node, StepRecord, StepStatus};
use jiff::Timestamp;
use tokio::time::{Instant, timeout};

use super::Engine;
use crate::decide;
use crate::history::Entry;
use crate::journal::{Failure, Operation, Request};
use crate::node_control::NodeControl;
use crate::operation;
use crate::orchestrator::checks::{self, Question};
use crate::orchestrator::trace;
use crate::protocol::Postmaster;
use crate::state::State;

/// Who asks for a failover that nobody asked for.
pub(super) const AUTOMATIC: &str = "automatic";
/// Longest wait for how a postmaster ended.
const LEARN: Duration = Duration::from_secs(2);

impl Engine {
    #[allow(clippy::too_many_arguments, reason = "each is a fact of the change that only the caller knows")]
    pub(super) async fn change(
        &mut self,
        state: &mut State,
        question: &Question,
        kind: Kind,
        id: String,
        actor: String,
        reason: String,
        bytes_at_risk: Option<u64>,
    ) -> anyhow::Result<Entry> {
        let since = Instant::now();
        let watched = &self.remote.watched;
        let (view, now) = (watched.view(), watched.now());
        let source = view.node(&state.primary).and_then(|seen| seen.status.as_ref());
        let standbys: BTreeSet<Node> = view
            .nodes
            .iter()
            .filter(|(node, seen)| **node != state.primary && seen.is_heard(now, &self.rules.policy))
            .map(|(node, _)| node.clone())
            .collect();
        let request = Request {
            id,
            kind,
            target: question.target.clone(),
            actor,
            reason,
            started_at: Timestamp::now(),
            wait_for: checks::wait_for_after(&question.target, state, &view, &self.rules, now),
            standbys,
            addresses: self.rules.addresses.clone(),
            // The source may be silent by now; its standbys are on its timeline.
            timeline: view.timeline(state.above),
            marker: source.map_or(0, |status| status.marker),
            acknowledged: source.map_or_else(Default::default, |status| status.acknowledged),
            bytes_at_risk,
            two_copies: self.rules.copies == Copies::TwoCopies,
        };
        self.remote.passed.send_replace(String::new());
        let remote = self.remote.clone();
        let run = operation::begin(&*remote, state, request, since);
        let (outcome, redis) = self.beside_redis(run).await;
        let (mut operation, failure) = outcome?;
        let took = since.elapsed();
        self.learn_how_it_ended(&mut operation).await;
        self.close(state, operation, failure, redis, took)
    }

    /// Completes the reason for the record: its agent told that the postmaster ended before it was told how. Awaited only after a
    /// decision: writes go on then, and nothing can be done with that node before.
    pub(super) async fn learn_how_it_ended(&self, operation: &mut Operation) {
        if operation.reason != decide::not_running(&operation.source) {
            return;
        }
        let watched = &self.remote.watched;
        let told = async {
            let awaited = Postmaster::Stopped { exit: None, clean: false, settled: false };
            loop {
                let (view, now) = (watched.view(), watched.now());
                // An agent that is not heard any more will not tell.
                let status =
                    view.node(&operation.source).and_then(|seen| seen.fresh(now, &self.rules.policy));
                if status.is_none_or(|status| status.postmaster != awaited) {
                    return;
                }
                watched.changed.notified().await;
            }
        };
        // Not told in time is an answer too.
        if operation.is_decided() {
            drop(timeout(LEARN, told).await);
            // Whatever came meanwhile is looked at after this.
            watched.changed.notify_one();
        }
        operation.reason = decide::exit_reason(&watched.view(), &operation.source);
    }

    /// Moves Redis as soon as the decision is durable, beside everything that follows it.
    pub(super) async fn beside_redis<T>(
        &self,
        run: impl Future<Output = anyhow::Result<T>>,
    ) -> (anyhow::Result<T>, Option<StepRecord>) {
        let mut passed = self.remote.passed.subscribe();
        let redis = async {
            let redis = self.redis.as_ref()?;
            passed
                .wait_for(|step| !matches!(step.as_str(), "" | "journal" | "prepare" | "fence"))
                .await
                .ok()?;
            let started = Instant::now();
            // The fence may have chosen another one than was asked for; the decision is durable by now.
            let decided = self.remote.state()?.primary;
            let (status, detail) = match redis.follow(&decided).await {
                Ok(moved) => match moved.is_master.zip(moved.sentinels_agree) {
                    Some((master, agrees)) => (
                        StepStatus::Done,
                        format!(
                            "Redis of {} is master after {} ms, most Sentinels say so after {} ms",
                            moved.to,
                            master.as_millis(),
                            agrees.as_millis()
                        ),
                    ),
                    None => (StepStatus::Done, format!("Redis of {} is master already", moved.to)),
                },
                Err(error) => (StepStatus::Failed, format!("{error:#}")),
            };
            Some(StepRecord::new(0, "redis", Timestamp::now(), started.elapsed(), status, detail))
        };
        tokio::pin!(redis);
        tokio::pin!(run);
        let mut moved = None;
        let outcome = tokio::select! {
            biased;
            outcome = &mut run => outcome,
            record = &mut redis => {
                moved = Some(record);
                run.await
            }
        };
        let decided = !matches!(self.remote.passed.borrow().as_str(), "" | "journal" | "prepare" | "fence");
        let record = match moved {
            Some(record) => record,
            None if decided => redis.await,
            None => None,
        };
        (outcome, record)
    }

    /// Into the history first, then out of the journal: dying in between makes neither a gap nor a double.
    pub(super) fn close(
        &mut self,
        state: &mut State,
        mut operation: Operation,
        failure: Option<Failure>,
        redis: Option<StepRecord>,
        took: Duration,
    ) -> anyhow::Result<Entry> {
        if let Some(mut record) = redis {
            record.number = u32::try_from(operation.steps.len()).unwrap_or(u32::MAX).saturating_add(1);
            operation.steps.push(record);
        }
        let by_word = matches!(operation.kind, Kind::Adopted | Kind::Discarded);
        let decided = operation.is_decided() && !by_word;
        match &failure {
            None => tracing::warn!(
                kind = ?operation.kind,
                source = operation.source,
                target = operation.target,
                gap_ms = operation.write_gap_ms,
                "done"
            ),
            Some(failure) => tracing::error!(
                step = failure.step.name(),
                error = failure.error,
                rolled_back = failure.rolled_back,
                "failover failed"
            ),
        }
        // A failover that fails is tried again until it works or somebody helps: one entry tells of all these tries.
        let failed = failure.as_ref().map(|failure| (operation.source.clone(), failure.step));
        let known = failed.is_some() && failed == self.told && operation.actor == AUTOMATIC;
        self.told = failed.filter(|_| operation.actor == AUTOMATIC);
        let entry = if known {
            let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            history.entries().last().context("the entry of the first try")?.clone()
        } else {
            let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            history.append(operation, failure, took)?.clone()
        };
        self.remote.passed("history");
        state.operation = None;
        state.failovers += u64::from(decided);
        self.remote.save(state)?;
        self.remote.passed("closed");
        self.metrics.finished(&entry);
        self.tracer.record(true, || trace::tell(&entry));
        // What was ordered before the change says nothing about after it.
        self.remote.watched.revise(|view| {
            for seen in view.nodes.values_mut() {
                (seen.cure, seen.trouble, seen.tries) = (None, None, 0);
                // Nor does it come and go by itself.
                (seen.drops, seen.present_since) = (Vec::new(), None);
            }
        });
        Ok(entry)
    }
}
