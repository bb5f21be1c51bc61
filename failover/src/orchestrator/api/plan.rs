//! `?dry_run=true`: what would be done, and whether it would be.

use std::sync::PoisonError;

use axum::Json;
use axum::response::{IntoResponse, Response};
use failover_api::{Kind, Plan, Problem};

use super::{Api, refuse, starting};
use crate::orchestrator::checks::{self, Question};
use crate::orchestrator::engine;

pub(super) fn plan(api: &Api, question: &Question) -> Response {
    let Some(state) = api.remote.state() else { return starting(api) };
    let (view, now) = (api.remote.watched.view(), api.remote.watched.now());
    let verdict = checks::judge(question, &state, &view, &api.rules, now);
    if let Err(denied) = &verdict.outcome
        && denied.code == "unknown_region"
    {
        return refuse(denied);
    }
    let kind = verdict.outcome.as_ref().ok().copied();
    let waits = checks::wait_for_after(&question.target, &state, &view, &api.rules, now);
    let mut plan = engine::planned_steps(kind.unwrap_or(Kind::Planned), !waits.is_empty());
    if api.redis.borrow().configured {
        plan.push("redis".into());
    }
    let earlier: Vec<f64> = {
        let history = api.history.lock().unwrap_or_else(PoisonError::into_inner);
        let same = history
            .entries()
            .iter()
            .rev()
            .filter(|entry| entry.success && Some(entry.operation.kind) == kind);
        same.take(20).map(|entry| entry.total_duration_ms).collect()
    };
    Json(Plan {
        dry_run: true,
        possible: kind.is_some(),
        kind,
        source_region: state.primary.clone(),
        target_region: question.target.clone(),
        plan,
        checks: verdict.checks,
        bytes_at_risk: verdict.bytes_at_risk,
        estimated_ms: median(earlier).unwrap_or(1500.0),
        copies_after: waits.len() + 1,
        refusal: verdict.outcome.err().map(|denied| Problem::new(denied.code, denied.message).error),
    })
    .into_response()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
