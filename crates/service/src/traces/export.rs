//! The way to the collector: what waits is taken once a second and sent, a bounded number at a time.

use std::time::Duration;

use anyhow::Context;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use super::{Metrics, NOT_TAKEN, Span, TraceSettings, Value};

/// Spans in one request: some 200 KB.
const AT_ONCE: usize = 512;
const EVERY: Duration = Duration::from_secs(1);
/// A collector that is away is told of this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// A span with its place in a trace; its parts stand for themselves.
#[derive(Debug)]
pub(super) struct Identified {
    pub(super) span: Span,
    pub(super) trace: TraceId,
    pub(super) id: SpanId,
    pub(super) parent: Option<SpanId>,
}

impl Identified {
    fn into_data(self, scope: &InstrumentationScope) -> SpanData {
        let Self { span, trace, id, parent } = self;
        let pair = |(key, value)| match value {
            Value::Count(count) => KeyValue::new(key, i64::try_from(count).unwrap_or(i64::MAX)),
            Value::Text(text) => KeyValue::new(key, text),
        };
        SpanData {
            span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: span.name,
            start_time: span.started,
            end_time: span.ended,
            attributes: span.values.into_iter().map(pair).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: span.error.map_or(Status::Unset, Status::error),
            instrumentation_scope: scope.clone(),
        }
    }
}

/// The task that sends.
#[derive(Debug)]
pub(super) struct Export {
    exporter: SpanExporter,
    scope: InstrumentationScope,
    spans: Receiver<Identified>,
    timeout: Duration,
    metrics: Metrics,
    complained: Option<Instant>,
    /// Dropped since the last complaint.
    unsaid: usize,
}

impl Export {
    pub(super) fn new(
        settings: &TraceSettings,
        service: &'static str,
        spans: Receiver<Identified>,
        metrics: Metrics,
    ) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder()
            .timeout(settings.timeout)
            .no_proxy()
            .build()
            .context("make the HTTP client for traces")?;
        let endpoint = format!("{}/v1/traces", settings.endpoint.trim_end_matches('/'));
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(endpoint)
            .with_timeout(settings.timeout)
            .build()
            .context("traces.endpoint")?;
        exporter.set_resource(
            &Resource::builder()
                .with_service_name(service)
                .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
                .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
                .build(),
        );
        let scope = InstrumentationScope::builder("tier0").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { exporter, scope, spans, timeout: settings.timeout, metrics, complained: None, unsaid: 0 })
    }

    /// Until everything else of the process has ended; then what waits is sent, as long as the collector takes it.
    pub(super) async fn run(mut self, drained: CancellationToken) {
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while drained.run_until_cancelled(tick.tick()).await.is_some() {
            self.send_what_waits().await;
        }
        self.send_what_waits().await;
    }

    /// Ends at the first request that fails: what is left waits for the next time.
    async fn send_what_waits(&mut self) {
        let mut batch = Vec::new();
        loop {
            while batch.len() < AT_ONCE
                && let Ok(identified) = self.spans.try_recv()
            {
                batch.push(identified.into_data(&self.scope));
            }
            if batch.is_empty() {
                return;
            }
            let count = batch.len();
            let sent = timeout(self.timeout, self.exporter.export(std::mem::take(&mut batch))).await;
            let error = match sent {
                Ok(Ok(())) => {
                    self.metrics.exported.inc_by(count as u64);
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer in {:?}", self.timeout),
            };
            self.metrics.dropped.with_label_values(&[NOT_TAKEN]).inc_by(count as u64);
            self.complain(&error, count);
            return;
        }
    }

    fn complain(&mut self, error: &str, dropped: usize) {
        self.unsaid += dropped;
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            tracing::warn!(error, dropped = self.unsaid, "the collector (traces.endpoint) takes no spans");
            self.complained = Some(Instant::now());
            self.unsaid = 0;
        }
    }
}
