//! The HTTP that people and scripts use; see the contract. Whatever changes something needs the token.

pub mod openapi;
mod person;
mod plan;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use failover_api::{HistoryReport, Mode, Problem, RedisReport, Report, Status};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use service::secret::Secret;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};

use crate::decide::Rules;
use crate::history::History;
use crate::orchestrator::checks::{Denied, Question};
use crate::orchestrator::engine::{self, Asked};
use crate::orchestrator::metrics::Metrics;
use crate::orchestrator::remote::Remote;
use crate::orchestrator::report::{self};
use crate::state::Answered;
use crate::token;

pub use person::{__path_adopt, __path_discard, adopt, discard};

/// Where callers find what they may ask.
pub const SEE: &str = "GET /openapi.json says what each call takes";
const MAX_BODY: usize = 4 << 10;
const MAX_REQUESTS: usize = 64;
const MAX_KEY: usize = 200;
/// Entries `GET /history` shows at most.
const MAX_ENTRIES: usize = 1000;

/// What the handlers need.
#[derive(Debug)]
pub struct Api {
    pub remote: Arc<Remote>,
    pub history: Arc<Mutex<History>>,
    pub rules: Rules,
    pub token: Secret,
    pub asked: mpsc::Sender<Asked>,
    pub redis: watch::Receiver<RedisReport>,
    pub metrics: Metrics,
    pub under_way: AtomicBool,
    pub places: Semaphore,
    pub bucket: Bucket,
}

/// At most so many requests a minute, with bursts of as many.
#[derive(Debug)]
pub struct Bucket {
    per_minute: f64,
    level: Mutex<(f64, Instant)>,
}

impl Bucket {
    #[must_use]
    pub fn new(per_minute: u32) -> Self {
        Self { per_minute: f64::from(per_minute), level: Mutex::new((f64::from(per_minute), Instant::now())) }
    }

    fn take(&self) -> bool {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let filled = level.0 + level.1.elapsed().as_secs_f64() * self.per_minute / 60.0;
        *level = (filled.min(self.per_minute), Instant::now());
        if level.0 < 1.0 {
            return false;
        }
        level.0 -= 1.0;
        true
    }
}

/// Places for requests at once.
#[must_use]
pub fn places() -> Semaphore {
    Semaphore::new(MAX_REQUESTS)
}

/// The routes.
pub fn routes(api: Arc<Api>) -> Router {
    let guarded = Router::new()
        .route("/failover/{region}", post(failover))
        .route("/mode", post(mode))
        .route("/adopt/{region}", post(adopt))
        .route("/discard/{region}", post(discard))
        // Of these routes only: what is not there is not there for anybody, and costs nobody's rate.
        .route_layer(middleware::from_fn_with_state(api.clone(), admit));
    Router::new()
        .route("/status", get(status))
        .route("/history", get(history))
        .route("/openapi.json", get(openapi))
        .merge(guarded)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(api.clone(), place))
        .with_state(api)
}

fn problem(status: u16, code: &str, message: impl Into<String>, details: serde_json::Value) -> Response {
    let mut body = Problem::new(code, message);
    body.error.details = details;
    (StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), Json(body)).into_response()
}

/// Whether a failover is under way, for as long as its caller is answered: a caller that hangs up leaves nothing behind.
struct Held<'a>(&'a AtomicBool);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

async fn place(State(api): State<Arc<Api>>, request: Request<Body>, next: Next) -> Response {
    let Ok(_place) = api.places.try_acquire() else {
        return problem(503, "busy", "too many requests at once", serde_json::Value::Null);
    };
    next.run(request).await
}

async fn admit(State(api): State<Arc<Api>>, request: Request<Body>, next: Next) -> Response {
    if !token::is_borne(request.headers(), &api.token) {
        api.metrics.unauthorized.inc();
        let message = "this changes something: send the token as Authorization: Bearer";
        return problem(401, "unauthorized", message, serde_json::Value::Null);
    }
    if !api.bucket.take() {
        return problem(
            429,
            "too_many_requests",
            "too many requests; wait a moment",
            serde_json::Value::Null,
        );
    }
    next.run(request).await
}

/// Why there is no state yet.
fn starting(api: &Api) -> Response {
    let reason = api.remote.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let reason = if reason.is_empty() { "see GET /health".to_owned() } else { reason };
    problem(503, "starting", format!("no primary is known yet: {reason}"), serde_json::Value::Null)
}

/// Who asks, for the record.
fn actor(headers: &HeaderMap) -> String {
    let actor = headers.get("x-actor").and_then(|value| value.to_str().ok()).unwrap_or("api");
    actor.chars().filter(|c| !c.is_control()).take(100).collect()
}

/// What is going on.
#[utoipa::path(get, path = "/status", responses(
    (status = 200, body = Status), (status = 503, description = "not started yet", body = Problem)))]
pub async fn status(State(api): State<Arc<Api>>) -> Response {
    let Some(state) = api.remote.state() else { return starting(&api) };
    let (view, now) = (api.remote.watched.view(), api.remote.watched.now());
    let doubts = view.doubts(&state, now, &api.rules.policy);
    let last = {
        let history = api.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.entries().last().map(report::report)
    };
    Json(Status {
        current_region: state.primary.clone(),
        primary_condition: report::condition(&view.condition(&state.primary, now, &api.rules.policy)),
        epoch: state.epoch,
        orchestrator: state.id.clone(),
        doubts: doubts.iter().map(ToString::to_string).collect(),
        writers_see: report::writers_see(&view, &api.rules, now),
        mode: state.mode,
        copies: api.rules.copies,
        sync_set: state.sync_set.clone(),
        wait_for: state.wait_for.clone(),
        nodes: report::nodes(&state, &view, &api.rules, now),
        redis: api.redis.borrow().clone(),
        deployment_version: env!("CARGO_PKG_VERSION").into(),
        failover_count: state.failovers,
        failover_under_way: state.operation.is_some(),
        last_failover: last,
        alarms: report::alarms(&state, &view, &api.rules, now)
            .into_iter()
            .chain(api.remote.alarm())
            .chain(api.redis.borrow().alarms.clone())
            .collect(),
    })
    .into_response()
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct HistoryQuery {
    /// Check the hash chain.
    verify: bool,
    /// At most so many entries, newest first.
    limit: Option<usize>,
}

/// Every change of the primary, newest first.
#[utoipa::path(get, path = "/history", params(HistoryQuery), responses((status = 200, body = HistoryReport)))]
pub async fn history(State(api): State<Arc<Api>>, Query(query): Query<HistoryQuery>) -> Response {
    let (failovers, verifier) = {
        let history = api.history.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = query.limit.unwrap_or(100).min(MAX_ENTRIES);
        let failovers = history.entries().iter().rev().take(limit).map(report::report).collect();
        (failovers, query.verify.then(|| history.verifier()))
    };
    let mut verification = None;
    if let Some(verifier) = verifier {
        // A long file: neither the engine, which appends to it, nor another request waits for its reader.
        let written = api.history.clone();
        let count = move || written.lock().unwrap_or_else(PoisonError::into_inner).entries().len() as u64;
        let verified = tokio::task::spawn_blocking(move || verifier.verify(count)).await;
        match verified.map_err(anyhow::Error::from).flatten() {
            Ok(done) => verification = Some(done),
            Err(error) => {
                let message = format!("{error:#}; look at the file and its disk");
                return problem(500, "history_unreadable", message, serde_json::Value::Null);
            }
        }
    }
    Json(HistoryReport { failovers, verification }).into_response()
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct FailoverQuery {
    /// Only the plan and the checks.
    dry_run: bool,
    /// Accept the loss of commits the target does not have.
    allow_data_loss: bool,
    /// Planned only: accept a target that lags; its data is checked after the stop.
    force: bool,
    /// Although the mode is `paused`.
    while_paused: bool,
    /// Refuse unless this is the primary.
    expected_primary: Option<String>,
}

/// Makes a region the primary.
#[utoipa::path(post, path = "/failover/{region}", params(("region" = String, Path), FailoverQuery,
    ("Idempotency-Key" = Option<String>, Header, description = "the same key gets the same answer and is never carried out twice")),
    security(("token" = [])),
    responses(
        (status = 200, description = "done; with dry_run, the plan", body = Report),
        (status = 400, description = "unknown region", body = Problem),
        (status = 401, description = "no or wrong token", body = Problem),
        (status = 409, description = "already there, under way, paused, other primary than expected, key used otherwise", body = Problem),
        (status = 412, description = "checks failed", body = Problem),
        (status = 429, description = "too many requests", body = Problem),
        (status = 500, description = "a step failed; the report names it and what was rolled back", body = Report),
        (status = 503, description = "no safe candidate", body = Problem)))]
pub async fn failover(
    State(api): State<Arc<Api>>,
    Path(region): Path<String>,
    Query(query): Query<FailoverQuery>,
    headers: HeaderMap,
) -> Response {
    let question = Question {
        target: region,
        allow_data_loss: query.allow_data_loss,
        force: query.force,
        while_paused: query.while_paused,
        expected_primary: query.expected_primary,
    };
    if query.dry_run {
        return plan::plan(&api, &question);
    }
    let id = engine::new_id();
    let answered = match key(&headers, &question, &id) {
        Ok(answered) => answered,
        Err(response) => return *response,
    };
    if let Some(answered) = &answered
        && let Some(response) = known(&api, answered)
    {
        return response;
    }
    // The second: its caller may have hung up.
    let held = (!api.under_way.swap(true, Ordering::SeqCst)).then(|| Held(&api.under_way));
    let busy = api.remote.state().is_some_and(|state| state.operation.is_some());
    if held.is_none() || busy {
        let message = "another failover is under way; see GET /status";
        return problem(409, "under_way", message, serde_json::Value::Null);
    }
    let actor = actor(&headers);
    let (reply, answer) = oneshot::channel();
    let sent = api.asked.try_send(Asked::Change { question, answered, id, actor, reply });
    let answer = match sent {
        Ok(()) => answer.await.ok(),
        Err(_) => None,
    };
    match answer {
        Some(Ok(entry)) => done(&report::report(&entry)),
        Some(Err(denied)) => refuse(&denied),
        None => problem(
            503,
            "busy",
            "the orchestrator is starting, busy or ending; try again",
            serde_json::Value::Null,
        ),
    }
}

fn done(report: &Report) -> Response {
    let status = if report.success { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
    (status, Json(report)).into_response()
}

fn refuse(denied: &Denied) -> Response {
    problem(denied.status, denied.code, denied.message.clone(), serde_json::Value::Null)
}

fn key(headers: &HeaderMap, question: &Question, id: &str) -> Result<Option<Answered>, Box<Response>> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| !key.is_empty() && key.len() <= MAX_KEY);
    let Some(key) = key else {
        let message = format!("Idempotency-Key must be 1 to {MAX_KEY} visible characters");
        return Err(Box::new(problem(400, "bad_idempotency_key", message, serde_json::Value::Null)));
    };
    let text = serde_json::to_vec(question).unwrap_or_default();
    let hash: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Some(Answered { key: key.into(), question: hash, at: Timestamp::now(), operation: id.into() }))
}

/// The answer a key has had already.
fn known(api: &Api, asked: &Answered) -> Option<Response> {
    let state = api.remote.state()?;
    let before = state.answered.iter().find(|before| before.key == asked.key)?;
    if before.question != asked.question {
        let message = "this Idempotency-Key was used for another request";
        return Some(problem(409, "idempotency_key_reused", message, serde_json::Value::Null));
    }
    let history = api.history.lock().unwrap_or_else(PoisonError::into_inner);
    match history.find(&before.operation) {
        Some(entry) => Some(done(&report::report(entry))),
        None => {
            let message = "the request with this Idempotency-Key is under way; ask again";
            Some(problem(409, "under_way", message, serde_json::Value::Null))
        }
    }
}

/// Body of `POST /mode`.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModeBody {
    pub mode: Mode,
}

/// Pauses or resumes automatic failover, and starting, stopping and rebuilding nodes. Paused, a standby that dies is
/// still given up, so that writes go on.
#[utoipa::path(post, path = "/mode", request_body = ModeBody, security(("token" = [])), responses(
    (status = 200, body = ModeBody), (status = 401, body = Problem), (status = 503, body = Problem)))]
pub async fn mode(State(api): State<Arc<Api>>, Json(body): Json<ModeBody>) -> Response {
    let (reply, answer) = oneshot::channel();
    if api.asked.try_send(Asked::Mode { mode: body.mode, reply }).is_ok()
        && let Ok(state) = answer.await
    {
        return Json(ModeBody { mode: state.mode }).into_response();
    }
    problem(503, "busy", "the orchestrator is starting, busy or ending; try again", serde_json::Value::Null)
}

async fn openapi() -> Response {
    Json(openapi::document()).into_response()
}
