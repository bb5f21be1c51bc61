//! What only a person may decide: whose data is the truth, and what is given up.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use failover_api::{Kind, Node, StepRecord, StepStatus};
use jiff::Timestamp;
use tokio::time::Instant;

use super::{Asked, Engine, new_id};
use crate::history::Entry;
use crate::journal::{Operation, Request, Step};
use crate::node_control::NodeControl;
use crate::orchestrator::adopt::{self, AdoptQuestion};
use crate::orchestrator::checks::Denied;
use crate::state::State;

impl Engine {
    /// Takes the world as it is for the new truth. The upkeep then brings it about.
    pub(super) fn adopt(
        &mut self,
        state: Option<State>,
        question: &AdoptQuestion,
        id: String,
        actor: String,
    ) -> anyhow::Result<Result<(State, Entry), Denied>> {
        let watched = &self.remote.watched;
        let (view, now, started) = (watched.view(), watched.now(), Instant::now());
        let verdict = adopt::judge(question, state.as_ref(), &view, &self.rules, now);
        let adoption = match verdict.outcome {
            Ok(adoption) => adoption,
            Err(denied) => return Ok(Err(denied)),
        };
        let mut next = state.unwrap_or_else(|| {
            let first = State::first(question.region.clone(), String::new(), Default::default());
            State { id: new_id(), ..first }
        });
        let mut operation = self.record(&next, Kind::Adopted, &question.region, &question.reason, id, actor);
        let detail = serde_json::to_string(&verdict.facts).unwrap_or_default();
        operation.steps.push(StepRecord::new(
            1,
            "adopt",
            Timestamp::now(),
            started.elapsed(),
            StepStatus::Done,
            detail,
        ));
        next.adopt(adoption, Timestamp::now());
        operation.epoch = next.epoch;
        operation.timeline_before = next.above;
        operation.wait_for_after = next.wait_for.clone();
        tracing::warn!(region = question.region, actor = operation.actor, epoch = next.epoch, "adopted");
        let entry = self.write_down(&mut next, operation, started)?;
        self.told = None;
        Ok(Ok((next, entry)))
    }

    /// Gives up what only `region` may have: it is rewritten like any other node from now on.
    pub(super) fn discard(
        &mut self,
        state: &mut State,
        region: &str,
        reason: String,
        id: String,
        actor: String,
    ) -> anyhow::Result<Result<Entry, Denied>> {
        let started = Instant::now();
        let kept = match adopt::may_discard(region, state, &self.rules) {
            Ok(kept) => kept,
            Err(denied) => return Ok(Err(denied)),
        };
        let mut operation = self.record(state, Kind::Discarded, region, &reason, id, actor);
        operation.steps.push(StepRecord::new(
            1,
            "discard",
            Timestamp::now(),
            started.elapsed(),
            StepStatus::Done,
            kept,
        ));
        state.discard(region);
        tracing::warn!(region, actor = operation.actor, "what was kept is given up");
        Ok(Ok(self.write_down(state, operation, started)?))
    }

    fn record(
        &self,
        state: &State,
        kind: Kind,
        target: &str,
        reason: &str,
        id: String,
        actor: String,
    ) -> Operation {
        let request = Request {
            id,
            kind,
            target: target.into(),
            actor,
            reason: if reason.is_empty() { "asked for".into() } else { reason.into() },
            started_at: Timestamp::now(),
            wait_for: Default::default(),
            standbys: Default::default(),
            addresses: BTreeMap::<Node, _>::new(),
            timeline: state.above,
            marker: 0,
            acknowledged: Default::default(),
            bytes_at_risk: None,
            two_copies: false,
        };
        Operation { completed: Step::Validate, ..state.opened(request) }
    }

    /// With the state into the journal, then into the history: dying in between makes neither a gap nor a double. Whoever was
    /// tried in vain is tried again at once.
    fn write_down(
        &mut self,
        state: &mut State,
        operation: Operation,
        started: Instant,
    ) -> anyhow::Result<Entry> {
        state.operation = Some(operation.clone());
        self.remote.save(state)?;
        let entry = self.close(state, operation, None, None, started.elapsed())?;
        self.remote.watched.revise(|view| {
            view.failed_fences = 0;
            view.nodes.values_mut().for_each(|seen| seen.not_before = Duration::ZERO);
        });
        Ok(entry)
    }

    /// Before the first state is there, only a region can be adopted.
    pub(super) fn answer_first(&mut self, asked: Asked) -> anyhow::Result<Option<State>> {
        let waiting = || {
            let reason = self.remote.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Denied { status: 503, code: "starting", message: format!("no primary is known yet: {reason}") }
        };
        match asked {
            Asked::Adopt { question, id, actor, reply } => match self.adopt(None, &question, id, actor)? {
                Ok((state, entry)) => {
                    drop(reply.send(Ok(Box::new(entry))));
                    return Ok(Some(state));
                }
                Err(denied) => drop(reply.send(Err(denied))),
            },
            Asked::Change { reply, .. } | Asked::Discard { reply, .. } => drop(reply.send(Err(waiting()))),
            // Its caller is told that we are starting.
            Asked::Mode { .. } => {}
        }
        Ok(None)
    }
}
