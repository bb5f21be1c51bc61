//! What the orchestrator exports.

use std::time::Duration;

use failover_api::{Kind, Mode, NodeReport, Role, word};
use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
};
use service::metrics::Registry;

use crate::history::Entry;
use crate::state::State;

pub(super) fn name(kind: Kind) -> String {
    word(&kind)
}

/// The orchestrator's own series.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub duration: HistogramVec,
    pub failovers: IntCounterVec,
    pub write_gap: prometheus::Histogram,
    pub last_total: Gauge,
    pub last_steps: GaugeVec,
    pub last_gap: Gauge,
    pub last_ended: Gauge,
    pub lag_bytes: GaugeVec,
    pub role: IntGaugeVec,
    pub agent_silence: GaugeVec,
    pub probe: HistogramVec,
    pub sync_set: IntGauge,
    pub wait_for: IntGauge,
    pub epoch: IntGauge,
    pub auto: IntGauge,
    pub alarms: IntGauge,
    pub doubts: IntGauge,
    pub kept: IntGaugeVec,
    pub replay_bytes: IntGaugeVec,
    pub actions: IntCounterVec,
    pub redis_up: IntGauge,
    pub redis_follows: IntGauge,
    pub unauthorized: IntCounter,
}

impl Metrics {
    /// # Errors
    /// When a name is taken.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let buckets = vec![0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];
        let histogram = |name, help, labels: &[&str]| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.clone()), labels)
        };
        let metrics = Self {
            duration: histogram(
                "failover_duration_seconds",
                "Duration of each phase; phase=total is the whole failover",
                &["phase"],
            )?,
            failovers: IntCounterVec::new(
                Opts::new("failover_failovers_total", "Changes of the primary, by kind and outcome"),
                &["kind", "outcome"],
            )?,
            write_gap: prometheus::Histogram::with_opts(
                HistogramOpts::new(
                    "failover_write_gap_seconds",
                    "Time from the source's end to the first commit on the target",
                )
                .buckets(buckets.clone()),
            )?,
            last_total: Gauge::new("failover_last_total_seconds", "Total duration of the last failover")?,
            last_steps: GaugeVec::new(
                Opts::new("failover_last_step_seconds", "Duration of each step of the last failover"),
                &["step"],
            )?,
            last_gap: Gauge::new(
                "failover_last_write_gap_seconds",
                "Write gap of the last failover; 0 when it is unknown",
            )?,
            last_ended: Gauge::new(
                "failover_last_timestamp_seconds",
                "When the last failover ended, seconds since 1970; 0: never",
            )?,
            lag_bytes: GaugeVec::new(
                Opts::new("failover_replication_lag_bytes", "WAL that the standby has not flushed"),
                &["node"],
            )?,
            role: IntGaugeVec::new(
                Opts::new("failover_node_role", "1 for the current role of a node"),
                &["node", "role"],
            )?,
            agent_silence: GaugeVec::new(
                Opts::new("failover_agent_silence_seconds", "Time since the agent last answered"),
                &["node"],
            )?,
            probe: histogram(
                "failover_probe_seconds",
                "Time Postgres took to answer the orchestrator's probe",
                &["node"],
            )?,
            sync_set: IntGauge::new(
                "failover_sync_set_size",
                "Standbys that have every acknowledged commit",
            )?,
            wait_for: IntGauge::new("failover_wait_for_size", "Standbys for which each commit waits")?,
            epoch: IntGauge::new("failover_epoch", "Current epoch")?,
            auto: IntGauge::new("failover_mode_auto", "1 in mode auto, 0 when paused")?,
            alarms: IntGauge::new("failover_alarms", "Alarms as shown by GET /status")?,
            doubts: IntGauge::new(
                "failover_doubts",
                "Reasons why the orchestrator's state is in doubt; above 0 it gives no orders",
            )?,
            kept: IntGaugeVec::new(
                Opts::new(
                    "failover_kept",
                    "1 while a node's data is kept and not rewritten until POST /discard",
                ),
                &["node"],
            )?,
            replay_bytes: IntGaugeVec::new(
                Opts::new("failover_replay_bytes", "WAL that a standby has received but not replayed"),
                &["node"],
            )?,
            actions: IntCounterVec::new(
                Opts::new("failover_actions_total", "Upkeep actions, by action and outcome"),
                &["action", "outcome"],
            )?,
            redis_up: IntGauge::new(
                "failover_redis_master_known",
                "1 while most Sentinels agree on the Redis master",
            )?,
            redis_follows: IntGauge::new(
                "failover_redis_follows",
                "1 while the Redis master is in the region of the primary, according to the instance and to most Sentinels",
            )?,
            unauthorized: IntCounter::new("failover_unauthorized_total", "Requests without a valid token")?,
        };
        registry.register(Box::new(metrics.duration.clone()))?;
        registry.register(Box::new(metrics.failovers.clone()))?;
        registry.register(Box::new(metrics.write_gap.clone()))?;
        registry.register(Box::new(metrics.last_total.clone()))?;
        registry.register(Box::new(metrics.last_steps.clone()))?;
        registry.register(Box::new(metrics.last_gap.clone()))?;
        registry.register(Box::new(metrics.last_ended.clone()))?;
        registry.register(Box::new(metrics.lag_bytes.clone()))?;
        registry.register(Box::new(metrics.role.clone()))?;
        registry.register(Box::new(metrics.agent_silence.clone()))?;
        registry.register(Box::new(metrics.probe.clone()))?;
        registry.register(Box::new(metrics.sync_set.clone()))?;
        registry.register(Box::new(metrics.wait_for.clone()))?;
        registry.register(Box::new(metrics.epoch.clone()))?;
        registry.register(Box::new(metrics.auto.clone()))?;
        registry.register(Box::new(metrics.alarms.clone()))?;
        registry.register(Box::new(metrics.doubts.clone()))?;
        registry.register(Box::new(metrics.kept.clone()))?;
        registry.register(Box::new(metrics.replay_bytes.clone()))?;
        registry.register(Box::new(metrics.actions.clone()))?;
        registry.register(Box::new(metrics.redis_up.clone()))?;
        registry.register(Box::new(metrics.redis_follows.clone()))?;
        registry.register(Box::new(metrics.unauthorized.clone()))?;
        // A counter that begins at 1 has not risen, as Prometheus sees it.
        for kind in [Kind::Planned, Kind::Unplanned, Kind::Forced, Kind::Adopted, Kind::Discarded] {
            for outcome in ["done", "failed"] {
                metrics.failovers.with_label_values(&[name(kind).as_str(), outcome]);
            }
        }
        Ok(metrics)
    }

    /// What the history says of the last failover, at the start and after each.
    pub fn last(&self, entry: &Entry) {
        self.last_steps.reset();
        for step in &entry.operation.steps {
            self.last_steps.with_label_values(&[step.action.as_str()]).set(step.duration_ms / 1000.0);
        }
        self.last_total.set(entry.total_duration_ms / 1000.0);
        self.last_gap.set(entry.operation.write_gap_ms.unwrap_or(0.0) / 1000.0);
        #[allow(clippy::cast_precision_loss, reason = "milliseconds since 1970 are far below 2^53")]
        self.last_ended.set(entry.ended_at.as_millisecond() as f64 / 1000.0);
    }

    /// Counts a finished operation.
    pub fn finished(&self, entry: &Entry) {
        let kind = name(entry.operation.kind);
        let outcome = if entry.success { "done" } else { "failed" };
        self.failovers.with_label_values(&[kind.as_str(), outcome]).inc();
        for step in &entry.operation.steps {
            self.duration.with_label_values(&[step.action.as_str()]).observe(step.duration_ms / 1000.0);
        }
        self.duration.with_label_values(&["total"]).observe(entry.total_duration_ms / 1000.0);
        self.last(entry);
        if let Some(gap) = entry.operation.write_gap_ms {
            self.write_gap.observe(gap / 1000.0);
        }
    }

    /// Sets the gauges to what is.
    pub fn show(&self, state: &State, nodes: &[NodeReport], alarms: usize, doubts: usize) {
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.sync_set.set(count(state.sync_set.len()));
        self.wait_for.set(count(state.wait_for.len()));
        self.epoch.set(i64::try_from(state.epoch).unwrap_or(i64::MAX));
        self.auto.set(i64::from(state.mode == Mode::Auto));
        self.alarms.set(count(alarms));
        self.doubts.set(count(doubts));
        for node in nodes {
            let name = node.region.as_str();
            for role in Role::ALL {
                let label = word(&role);
                self.role.with_label_values(&[name, label.as_str()]).set(i64::from(node.role == role));
            }
            self.kept.with_label_values(&[name]).set(i64::from(node.kept.is_some()));
            let replay = i64::try_from(node.replay_bytes.unwrap_or(0)).unwrap_or(i64::MAX);
            self.replay_bytes.with_label_values(&[name]).set(replay);
            #[allow(clippy::cast_precision_loss, reason = "a lag of 2^53 bytes would be shown inexactly")]
            self.lag_bytes.with_label_values(&[name]).set(node.lag_bytes.unwrap_or(0) as f64);
            let silence =
                node.agent_last_seen_ms.map_or(f64::INFINITY, |ms| Duration::from_millis(ms).as_secs_f64());
            self.agent_silence.with_label_values(&[name]).set(silence);
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::history::History;
    use crate::journal::Request;

    #[test]
    fn the_last_failover_is_shown_from_the_history_and_counters_begin_at_zero() {
        let state = State::first("region1".into(), "s".into(), Default::default());
        let request = Request {
            id: "a".into(),
            kind: Kind::Planned,
            target: "region2".into(),
            actor: "test".into(),
            reason: "because".into(),
            started_at: Timestamp::UNIX_EPOCH,
            wait_for: Default::default(),
            standbys: Default::default(),
            addresses: Default::default(),
            timeline: 1,
            marker: 0,
            acknowledged: Default::default(),
            bytes_at_risk: Some(0),
            two_copies: false,
        };
        let mut operation = state.opened(request);
        operation.write_gap_ms = Some(250.0);
        operation.steps.push(failover_api::StepRecord {
            number: 1,
            action: "promote".into(),
            started_at: None,
            duration_ms: 120.0,
            status: failover_api::StepStatus::Done,
            detail: String::new(),
        });
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(dir.path()).unwrap();
        history.append(operation, None, Duration::from_secs(1_000)).unwrap();
        let metrics = Metrics::new(&Registry::new()).unwrap();
        assert_eq!(metrics.failovers.with_label_values(&["forced", "failed"]).get(), 0);
        metrics.last(history.entries().last().unwrap());
        assert!((metrics.last_ended.get() - 1_000.0).abs() < 1e-9);
        assert!((metrics.last_gap.get() - 0.25).abs() < 1e-9);
        assert!((metrics.last_steps.with_label_values(&["promote"]).get() - 0.12).abs() < 1e-9);
        assert_eq!(metrics.failovers.with_label_values(&["planned", "done"]).get(), 0, "not of this process");
    }
}
