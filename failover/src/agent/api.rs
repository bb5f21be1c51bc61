//! The agent's HTTP: `GET /v1/status` (a long poll) and `POST /v1/orders`, both with the token.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use failover_api::{Problem, word};
use serde::Deserialize;
use service::secret::Secret;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::agent::metrics::Metrics;
use crate::agent::orders::Orders;
use crate::protocol::{Code, Command, NodeStatus};
use crate::token;

/// Where callers find what they may ask.
pub const SEE: &str = "agents speak with the orchestrator of their own version only; people ask the orchestrator, see its GET /openapi.json";
/// An order is a few hundred bytes.
const MAX_BODY: usize = 16 << 10;
/// One orchestrator asks; more at once is a mistake or an attack.
const MAX_REQUESTS: usize = 64;
const MAX_WAIT: Duration = Duration::from_secs(10);

/// What the handlers need.
#[derive(Debug)]
pub struct Api {
    pub orders: Orders,
    pub token: Secret,
    pub tasks: TaskTracker,
    pub metrics: Metrics,
    places: Semaphore,
}

impl Api {
    #[must_use]
    pub fn new(orders: Orders, token: Secret, tasks: TaskTracker, metrics: Metrics) -> Self {
        Self { orders, token, tasks, metrics, places: Semaphore::new(MAX_REQUESTS) }
    }
}

/// The routes.
pub fn routes(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/orders", post(order))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(api.clone(), admit))
        .with_state(api)
}

async fn admit(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    if !token::is_borne(request.headers(), &api.token) {
        api.metrics.unauthorized.inc();
        let problem =
            Problem::new("unauthorized", "this needs the orchestrator's token as Authorization: Bearer");
        return (StatusCode::UNAUTHORIZED, Json(problem)).into_response();
    }
    let Ok(_place) = api.places.try_acquire() else {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(Problem::new("busy", "too many requests at once")))
            .into_response();
    };
    next.run(request).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Poll {
    /// Answer when the status is newer than this,
    #[serde(default)]
    after: u64,
    /// or when this time has passed.
    #[serde(default)]
    wait_ms: u64,
}

async fn status(State(api): State<Arc<Api>>, Query(poll): Query<Poll>) -> Json<NodeStatus> {
    let shared = &api.orders.node().shared;
    if poll.wait_ms > 0 {
        shared.newer_than(poll.after, Duration::from_millis(poll.wait_ms).min(MAX_WAIT)).await;
    }
    let status = shared.status();
    api.metrics.up.set(i64::from(status.is_running()));
    api.metrics.writable.set(i64::from(status.is_writable()));
    Json(status)
}

async fn order(State(api): State<Arc<Api>>, Json(command): Json<Command>) -> Response {
    let name = command.what.name();
    let timer = api.metrics.order_seconds.start_timer();
    // In a task of its own: an order that has begun is carried to its end even if the asker goes away.
    let task = {
        let api = api.clone();
        api.tasks.clone().spawn(async move { api.orders.carry_out(command).await })
    };
    let result = task.await;
    timer.observe_duration();
    let outcome = if matches!(result, Ok(Ok(_))) { "done" } else { "refused" };
    api.metrics.orders.with_label_values(&[name, outcome]).inc();
    match result {
        Ok(Ok(status)) => Json(status).into_response(),
        Ok(Err(refusal)) => {
            let status = match refusal.code {
                Code::Timeout => StatusCode::GATEWAY_TIMEOUT,
                Code::Failed => StatusCode::INTERNAL_SERVER_ERROR,
                _ => StatusCode::CONFLICT,
            };
            (status, Json(Problem::new(&word(&refusal.code), refusal.message))).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(Problem::new("failed", error.to_string())))
            .into_response(),
    }
}
