//! What only a person may decide: `POST /adopt/{region}` and `POST /discard/{region}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use failover_api::{AdoptPlan, Problem, Report};
use serde::Deserialize;
use tokio::sync::oneshot;
use utoipa::IntoParams;

use super::{Api, actor, done, problem, refuse, starting};
use crate::history::Entry;
use crate::orchestrator::adopt::{self, AdoptQuestion};
use crate::orchestrator::checks::Denied;
use crate::orchestrator::engine::{self, Asked};
use crate::orchestrator::report;

/// Of a reason, in characters.
const REASON: usize = 500;

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct AdoptQuery {
    /// Only the facts and the checks.
    dry_run: bool,
    /// Although another node may have readings that this one has not: its data is kept, but nobody reads it.
    allow_data_loss: bool,
    /// Although the agent of another node is not heard: it may be writable.
    while_unheard: bool,
    /// For the history.
    reason: String,
}

/// Takes the world as it is for the new truth: this region is the primary, and this orchestrator the one that agents obey.
/// For when the orchestrator's state is older than the facts (a directory that was lost or restored, a promotion by hand). It
/// destroys nothing: data that may hold what the region lacks is kept.
#[utoipa::path(post, path = "/adopt/{region}", params(("region" = String, Path), AdoptQuery), security(("token" = [])),
    responses(
        (status = 200, description = "written down; with dry_run, the facts", body = Report),
        (status = 400, description = "unknown region", body = Problem),
        (status = 401, description = "no or wrong token", body = Problem),
        (status = 409, description = "a failover is under way", body = Problem),
        (status = 412, description = "checks failed", body = Problem),
        (status = 503, description = "busy", body = Problem)))]
pub async fn adopt(
    State(api): State<Arc<Api>>,
    Path(region): Path<String>,
    Query(query): Query<AdoptQuery>,
    headers: HeaderMap,
) -> Response {
    let question = AdoptQuestion {
        region,
        allow_data_loss: query.allow_data_loss,
        while_unheard: query.while_unheard,
        reason: shortened(&query.reason),
    };
    if query.dry_run {
        let (view, now) = (api.remote.watched.view(), api.remote.watched.now());
        let verdict = adopt::judge(&question, api.remote.state().as_ref(), &view, &api.rules, now);
        return Json(AdoptPlan {
            dry_run: true,
            possible: verdict.outcome.is_ok(),
            region: question.region,
            checks: verdict.checks,
            nodes: verdict.facts,
            refusal: verdict.outcome.err().map(|denied| Problem::new(denied.code, denied.message).error),
        })
        .into_response();
    }
    let (reply, answer) = oneshot::channel();
    let asked = Asked::Adopt { question, id: engine::new_id(), actor: actor(&headers), reply };
    ask(&api, asked, answer).await
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct DiscardQuery {
    /// Only whether it would be done, and what would be given up.
    dry_run: bool,
    /// For the history.
    reason: String,
}

/// Gives up what only this region may have: its data is rewritten from the primary like any other. Take out what is missing
/// first.
#[utoipa::path(post, path = "/discard/{region}", params(("region" = String, Path), DiscardQuery), security(("token" = [])),
    responses(
        (status = 200, description = "written down; with dry_run, what would be given up", body = Report),
        (status = 400, description = "unknown region", body = Problem),
        (status = 401, description = "no or wrong token", body = Problem),
        (status = 409, description = "nothing of it is kept", body = Problem),
        (status = 503, description = "busy", body = Problem)))]
pub async fn discard(
    State(api): State<Arc<Api>>,
    Path(region): Path<String>,
    Query(query): Query<DiscardQuery>,
    headers: HeaderMap,
) -> Response {
    if query.dry_run {
        let Some(state) = api.remote.state() else { return starting(&api) };
        return match adopt::may_discard(&region, &state, &api.rules) {
            Ok(kept) => Json(
                serde_json::json!({"dry_run": true, "possible": true, "region": region, "gives_up": kept}),
            )
            .into_response(),
            Err(denied) => refuse(&denied),
        };
    }
    let (reply, answer) = oneshot::channel();
    let (reason, id) = (shortened(&query.reason), engine::new_id());
    ask(&api, Asked::Discard { region, reason, id, actor: actor(&headers), reply }, answer).await
}

fn shortened(reason: &str) -> String {
    reason.chars().filter(|c| !c.is_control()).take(REASON).collect()
}

async fn ask(api: &Api, asked: Asked, answer: oneshot::Receiver<Result<Box<Entry>, Denied>>) -> Response {
    let answer = match api.asked.try_send(asked) {
        Ok(()) => answer.await.ok(),
        Err(_) => None,
    };
    match answer {
        Some(Ok(entry)) => done(&report::report(&entry)),
        Some(Err(denied)) => refuse(&denied),
        None => {
            let message = "the orchestrator is busy, ending, or cannot write its directory; see GET /status and try again";
            problem(503, "busy", message, serde_json::Value::Null)
        }
    }
}
