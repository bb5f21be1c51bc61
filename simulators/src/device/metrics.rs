//! What `/metrics` says about the simulator. Never a label per device or connection.

use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    process_collector::ProcessCollector,
};
use service::metrics::Registry;

/// Registered once; clones share the series.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub sent: IntCounter,
    pub acknowledged: IntCounter,
    pub refused: IntCounterVec,
    pub resent: IntCounter,
    pub skipped: IntCounter,
    pub in_flight: IntGauge,
    pub connections: IntGauge,
    pub behind_seconds: Gauge,
    pub reconnects: IntCounter,
    pub puback_seconds: Histogram,
}

impl Metrics {
    /// # Errors
    /// When a series is registered twice.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("device_simulator_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(format!("device_simulator_{name}"), help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let refused = IntCounterVec::new(
            Opts::new(
                "device_simulator_refused_total",
                "Messages that the broker did not accept, by its reason",
            ),
            &["reason"],
        )?;
        registry.register(Box::new(refused.clone()))?;
        let behind_seconds = Gauge::new(
            "device_simulator_behind_seconds",
            "Delay of the connection that is furthest behind its schedule",
        )?;
        registry.register(Box::new(behind_seconds.clone()))?;
        let puback_seconds = Histogram::with_opts(
            HistogramOpts::new(
                "device_simulator_puback_seconds",
                "From a message's write to its acknowledgement, to within a tick",
            )
            .buckets(vec![
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
            ]),
        )?;
        registry.register(Box::new(puback_seconds.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Self {
            sent: counter("sent_total", "Messages written to the broker, including repeats and retries")?,
            acknowledged: counter(
                "acknowledged_total",
                "Messages that the broker accepted (QoS 0: written)",
            )?,
            refused,
            resent: counter("resent_total", "Messages written again because a connection was lost")?,
            skipped: counter("skipped_total", "Messages skipped because they were due too long ago")?,
            in_flight: gauge("in_flight", "Messages that wait for their acknowledgement")?,
            connections: gauge("connections", "MQTT connections that are up")?,
            behind_seconds,
            reconnects: counter("reconnects_total", "Connections lost after they had been up")?,
            puback_seconds,
        })
    }
}
