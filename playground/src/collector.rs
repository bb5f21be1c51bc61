//! An OpenTelemetry collector that remembers: what our processes send to `traces.endpoint`, decoded.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

/// A span as it arrived.
#[derive(Debug, Clone)]
pub struct Span {
    /// `service.name` of the process.
    pub service: String,
    pub name: String,
    pub trace: Vec<u8>,
    pub id: Vec<u8>,
    /// Empty for the root of a trace.
    pub parent: Vec<u8>,
    /// Nanoseconds since 1970.
    pub started: u64,
    pub ended: u64,
    pub values: BTreeMap<String, String>,
    pub error: Option<String>,
}

impl Span {
    /// # Panics
    /// When the span lacks the value, or it is no number.
    #[must_use]
    pub fn count(&self, key: &str) -> u64 {
        let value = self.values.get(key).and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("no count {key} in {self:?}"))
    }
}

#[derive(Debug, Default)]
struct Taken {
    spans: Mutex<Vec<Span>>,
    changed: Notify,
}

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Collector {
    endpoint: String,
    taken: Arc<Taken>,
    _server: JoinSet<std::io::Result<()>>,
}

impl Collector {
    /// # Errors
    /// When no port is free.
    pub async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listen for traces")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let taken = Arc::new(Taken::default());
        let routes = Router::new().route("/v1/traces", post(take)).with_state(taken.clone());
        let mut server = JoinSet::new();
        server.spawn(axum::serve(listener, routes).into_future());
        Ok(Self { endpoint, taken, _server: server })
    }

    /// For `traces.endpoint`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Everything that has come.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        self.taken.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until what has come fulfils a condition.
    ///
    /// # Errors
    /// What has come, when it does not in time.
    pub async fn until(
        &self,
        patience: Duration,
        fulfilled: impl Fn(&[Span]) -> bool,
    ) -> anyhow::Result<Vec<Span>> {
        let deadline = Instant::now() + patience;
        loop {
            let changed = self.taken.changed.notified();
            let spans = self.spans();
            if fulfilled(&spans) {
                return Ok(spans);
            }
            if timeout_at(deadline, changed).await.is_err() {
                bail!("not all spans after {patience:?}: {spans:#?}");
            }
        }
    }
}

async fn take(State(taken): State<Arc<Taken>>, body: Bytes) -> StatusCode {
    let Ok(request) = ExportTraceServiceRequest::decode(body) else { return StatusCode::BAD_REQUEST };
    let mut spans = Vec::new();
    for resource in request.resource_spans {
        let of = resource.resource.map(|resource| values(resource.attributes)).unwrap_or_default();
        let service = of.get("service.name").cloned().unwrap_or_default();
        spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans).map(|span| Span {
            service: service.clone(),
            name: span.name,
            trace: span.trace_id,
            id: span.span_id,
            parent: span.parent_span_id,
            started: span.start_time_unix_nano,
            ended: span.end_time_unix_nano,
            values: values(span.attributes),
            // 2 is an error.
            error: span.status.filter(|status| status.code == 2).map(|status| status.message),
        }));
    }
    taken.spans.lock().unwrap_or_else(PoisonError::into_inner).extend(spans);
    taken.changed.notify_one();
    StatusCode::OK
}

fn values(pairs: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    pairs.into_iter().map(|pair| (pair.key, text(pair.value))).collect()
}
