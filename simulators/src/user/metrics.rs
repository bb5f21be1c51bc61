//! What `/metrics` says about the simulator. Never a label per user.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge};
use service::metrics::Registry;

/// Registered once; clones share the series.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub sent: IntCounter,
    pub confirmed: IntCounter,
    pub refused: IntCounter,
    pub resent: IntCounter,
    pub skipped: IntCounter,
    pub in_flight: IntGauge,
    pub blocked: IntGauge,
    pub reconnects: IntCounter,
    pub confirm_seconds: Histogram,
}

impl Metrics {
    /// # Errors
    /// When a series is registered twice.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("user_simulator_{name}"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(format!("user_simulator_{name}"), help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let confirm_seconds = Histogram::with_opts(
            HistogramOpts::new("user_simulator_confirm_seconds", "From publishing to the broker's confirm")
                .buckets(vec![
                    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
                ]),
        )?;
        registry.register(Box::new(confirm_seconds.clone()))?;
        Ok(Self {
            sent: counter("sent_total", "Messages published, including repeats and retries")?,
            confirmed: counter("confirmed_total", "Messages that the broker confirmed")?,
            refused: counter(
                "refused_total",
                "Messages that the broker refused or returned; they are published again",
            )?,
            resent: counter("resent_total", "Messages published again because a connection was lost")?,
            skipped: counter("skipped_total", "Messages skipped because they were due too long ago")?,
            in_flight: gauge("in_flight", "Messages that wait for their confirm")?,
            blocked: gauge("blocked", "1 while the broker accepts no messages (memory or disk alarm)")?,
            reconnects: counter("reconnects_total", "Connections lost after they had been up")?,
            confirm_seconds,
        })
    }
}
