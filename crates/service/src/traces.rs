//! Spans to an OpenTelemetry collector: what a process did and how long each part of it took, told when it is over.
//!
//! A [`Span`] is handed in finished, with its children; the work it tells of never waits for it and knows no
//! OpenTelemetry. What the collector does not take in time is dropped and counted. Without an endpoint all of it is one
//! check of an empty option.

mod export;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};
use prometheus::{IntCounter, IntCounterVec, Opts};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::metrics::Registry;
use crate::process::Process;

/// Spans to an OpenTelemetry collector (docs/tracing.md).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TraceSettings {
    /// The collector's OTLP endpoint over HTTP, for example `http://127.0.0.1:4318`. Empty: tracing is off.
    pub endpoint: String,
    /// Sampling ratio for routine batches, from 0 to 1. Batches that failed or were retried, and changes of
    /// the primary, are always sent.
    pub sample: f64,
    /// Maximum number of spans queued for the collector. Further spans are dropped and counted.
    pub queue: usize,
    /// Maximum time for the collector to accept up to 512 spans, all attempts together.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub timeout: Duration,
}

impl Default for TraceSettings {
    fn default() -> Self {
        Self { endpoint: String::new(), sample: 1.0, queue: 4096, timeout: Duration::from_secs(5) }
    }
}

impl TraceSettings {
    /// # Errors
    /// One sentence naming the key.
    pub fn check(&self) -> Result<(), String> {
        let address = self.endpoint.strip_prefix("http://");
        if !self.endpoint.is_empty() && address.is_none_or(|address| address.trim_matches('/').is_empty()) {
            return Err(
                "traces.endpoint must be empty or http://HOST:PORT; for TLS run a collector on this machine"
                    .into(),
            );
        }
        if !(0.0..=1.0).contains(&self.sample) {
            return Err("traces.sample must be from 0 to 1".into());
        }
        if !(64..=1_000_000).contains(&self.queue) {
            return Err("traces.queue must be from 64 to 1000000".into());
        }
        if self.timeout.is_zero() {
            return Err("traces.timeout must be above 0".into());
        }
        Ok(())
    }
}

/// A value of a span.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Count(u64),
    Text(String),
}

impl From<usize> for Value {
    fn from(count: usize) -> Self {
        Self::Count(count as u64)
    }
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// Something that was done, and its parts.
#[derive(Debug, Clone)]
pub struct Span {
    pub name: Cow<'static, str>,
    pub started: SystemTime,
    pub ended: SystemTime,
    pub values: Vec<(&'static str, Value)>,
    /// Why it failed.
    pub error: Option<String>,
    pub parts: Vec<Span>,
}

impl Span {
    #[must_use]
    pub fn new(name: impl Into<Cow<'static, str>>, started: SystemTime, ended: SystemTime) -> Self {
        Self { name: name.into(), started, ended, values: Vec::new(), error: None, parts: Vec::new() }
    }

    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.values.push((key, value.into()));
        self
    }

    #[must_use]
    pub fn failed(mut self, error: impl Into<String>) -> Self {
        self.error = Some(error.into());
        self
    }

    fn count(&self) -> usize {
        1 + self.parts.iter().map(Span::count).sum::<usize>()
    }
}

/// The same moment by both clocks: work is measured by the one and told of by the other.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    instant: Instant,
    time: SystemTime,
}

impl Moment {
    #[must_use]
    pub fn now() -> Self {
        Self { instant: Instant::now(), time: jiff::Timestamp::now().into() }
    }

    #[must_use]
    pub fn instant(self) -> Instant {
        self.instant
    }

    /// What the wall clock showed, or will show.
    #[must_use]
    pub fn time_of(self, instant: Instant) -> SystemTime {
        match self.instant.checked_duration_since(instant) {
            Some(ago) => self.time.checked_sub(ago).unwrap_or(self.time),
            None => self.time + instant.duration_since(self.instant),
        }
    }
}

/// What the process exports about its spans.
#[derive(Debug, Clone)]
struct Metrics {
    exported: IntCounter,
    dropped: IntCounterVec,
}

impl Metrics {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            exported: IntCounter::new("traces_exported_spans_total", "Spans that the collector accepted")?,
            dropped: IntCounterVec::new(
                Opts::new(
                    "traces_dropped_spans_total",
                    "Spans dropped because the queue for the collector was full, or because the collector did not accept them",
                ),
                &["reason"],
            )?,
        };
        registry.register(Box::new(metrics.exported.clone()))?;
        registry.register(Box::new(metrics.dropped.clone()))?;
        for reason in [QUEUE_FULL, NOT_TAKEN] {
            metrics.dropped.with_label_values(&[reason]);
        }
        Ok(metrics)
    }
}

const QUEUE_FULL: &str = "queue_full";
const NOT_TAKEN: &str = "not_taken";

#[derive(Debug)]
struct Inner {
    sample: f64,
    ids: RandomIdGenerator,
    queue: mpsc::Sender<export::Identified>,
    metrics: Metrics,
}

/// Where spans are handed in. Clones share it; the default one is off.
#[derive(Debug, Clone, Default)]
pub struct Tracer(Option<Arc<Inner>>);

impl Tracer {
    /// Starts the export when the settings name an endpoint. `service` is what the collector knows the process by.
    ///
    /// # Errors
    /// When a series is registered already, or the endpoint is no address.
    pub fn start(
        settings: &TraceSettings,
        service: &'static str,
        registry: &Registry,
        process: &mut Process,
    ) -> anyhow::Result<Self> {
        let metrics = Metrics::new(registry)?;
        if settings.endpoint.is_empty() {
            return Ok(Self::default());
        }
        let (queue, spans) = mpsc::channel(settings.queue);
        let export = export::Export::new(settings, service, spans, metrics.clone())?;
        process.finish_with(|drained| export.run(drained));
        let ids = RandomIdGenerator::default();
        Ok(Self(Some(Arc::new(Inner { sample: settings.sample, ids, queue, metrics }))))
    }

    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Hands in what `tell` says, unless nothing is traced or it was left out of the sample. Never waits.
    pub fn record(&self, eventful: bool, tell: impl FnOnce() -> Span) {
        let Some(inner) = &self.0 else { return };
        if eventful || rand::random::<f64>() < inner.sample {
            inner.send(tell());
        }
    }
}

impl Inner {
    /// A span and its parts, or nothing of it: half of a trace misleads.
    fn send(&self, span: Span) {
        let count = span.count();
        let Ok(mut places) = self.queue.try_reserve_many(count) else {
            self.metrics.dropped.with_label_values(&[QUEUE_FULL]).inc_by(count as u64);
            return;
        };
        let mut waiting = vec![(span, None)];
        let trace = self.ids.new_trace_id();
        while let Some((mut span, parent)) = waiting.pop() {
            let id = self.ids.new_span_id();
            waiting.extend(std::mem::take(&mut span.parts).into_iter().map(|part| (part, Some(id))));
            if let Some(place) = places.next() {
                place.send(export::Identified { span, trace, id, parent });
            }
        }
    }
}

#[cfg(test)]
mod tests;
