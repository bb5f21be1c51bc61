//! The server for `/metrics`, `/health/live`, `/health/ready` and `/health` (= ready) of a process.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::metrics::Registry;
use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::TextEncoder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::health::Health;

/// Where a process serves `/metrics`, `/health/live` and `/health/ready`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HttpSettings {
    /// Address to listen on. The default accepts connections from this machine only.
    pub bind: IpAddr,
    /// 0 selects a free port, which is logged. `failover-orchestrator` uses 8003; `tier0 up` assigns 9101,
    /// 9102 ..
    pub port: u16,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self { bind: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 0 }
    }
}

#[derive(Clone)]
struct Shared {
    registry: Registry,
    health: Health,
}

/// A registry with the process' own series (memory, CPU, open files) in it.
///
/// # Errors
/// When /proc cannot be read.
pub fn registry() -> anyhow::Result<Registry> {
    let registry = Registry::new();
    registry
        .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
        .context("register the process' series")?;
    Ok(registry)
}

/// Opens the port, so that a taken one is an error at start.
///
/// # Errors
/// When the address cannot be bound; the message names the setting.
pub async fn bind(settings: &HttpSettings) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(settings.bind, settings.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listen on {address} (http.bind, http.port) for metrics and health"))?;
    tracing::info!(address = %listener.local_addr()?, "metrics and health are served");
    Ok(listener)
}

/// The routes every process has; a process with routes of its own merges them. From here on `health` takes no more dependencies.
pub fn routes(registry: Registry, health: Health) -> Router {
    health.serve();
    Router::new()
        .route("/metrics", get(metrics))
        .route("/health/live", get(|| async { "live\n" }))
        .route("/health/ready", get(ready))
        .route("/health", get(ready))
        .with_state(Shared { registry, health })
}

/// Serves until the token is cancelled; requests under way are finished.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, routes: Router, shutdown: CancellationToken) -> anyhow::Result<()> {
    axum::serve(listener, routes)
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .await
        .context("serve metrics and health")
}

async fn metrics(State(shared): State<Shared>) -> Response {
    match TextEncoder::new().encode_to_string(&shared.registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn ready(State(shared): State<Shared>) -> Response {
    let failing = shared.health.failing();
    let status = if failing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({ "ready": failing.is_empty(), "failing": failing });
    (status, axum::Json(body)).into_response()
}
