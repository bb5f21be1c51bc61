//! What is told of a change of the primary: one trace, a span for each step, made from the entry in the history. So an
//! orchestrator that died on the way loses nothing of it.

use std::time::{Duration, SystemTime};

use failover_api::StepStatus;
use service::traces::Span;

use crate::history::Entry;

/// The operation and its steps.
pub(super) fn tell(entry: &Entry) -> Span {
    let operation = &entry.operation;
    let outcome = match (&entry.failure, operation.is_decided()) {
        (None, _) => "done",
        (Some(_), true) => "unfinished",
        (Some(_), false) => "undone",
    };
    let mut span = Span::new("failover", operation.started_at.into(), entry.ended_at.into())
        .with("tier0.operation", operation.id.as_str())
        .with("tier0.kind", super::metrics::name(operation.kind))
        .with("tier0.source", operation.source.as_str())
        .with("tier0.target", operation.target.as_str())
        .with("tier0.epoch", operation.epoch)
        .with("tier0.reason", operation.reason.as_str())
        .with("tier0.outcome", outcome);
    if let Some(failure) = &entry.failure {
        span = span.failed(format!("{}: {}", failure.step.name(), failure.error));
    }
    let mut ended: SystemTime = operation.started_at.into();
    for record in &operation.steps {
        let started = record.started_at.map_or(ended, Into::into);
        ended = started + Duration::try_from_secs_f64(record.duration_ms / 1000.0).unwrap_or_default();
        let mut step = Span::new(record.action.clone(), started, ended)
            .with("tier0.step", u64::from(record.number))
            .with("tier0.status", failover_api::word(&record.status))
            .with("tier0.detail", record.detail.as_str());
        if record.status == StepStatus::Failed {
            step = step.failed(record.detail.as_str());
        }
        span.parts.push(step);
    }
    span
}
