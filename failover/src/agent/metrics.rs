//! What an agent exports.

use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGauge, Opts};
use service::metrics::Registry;

/// The agent's own series.
#[derive(Debug, Clone)]
pub struct Metrics {
    pub orders: IntCounterVec,
    pub order_seconds: Histogram,
    pub unauthorized: prometheus::IntCounter,
    pub up: IntGauge,
    pub writable: IntGauge,
}

impl Metrics {
    /// # Errors
    /// When a name is taken.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            orders: IntCounterVec::new(
                Opts::new("region_agent_orders_total", "Orders by kind and outcome"),
                &["order", "outcome"],
            )?,
            order_seconds: Histogram::with_opts(HistogramOpts::new(
                "region_agent_order_seconds",
                "Time to carry out an order",
            ))?,
            unauthorized: prometheus::IntCounter::new(
                "region_agent_unauthorized_total",
                "Requests without a valid token",
            )?,
            up: IntGauge::new("region_agent_postgres_up", "1 while the postmaster runs and answers")?,
            writable: IntGauge::new("region_agent_postgres_writable", "1 while Postgres is not in recovery")?,
        };
        registry.register(Box::new(metrics.orders.clone()))?;
        registry.register(Box::new(metrics.order_seconds.clone()))?;
        registry.register(Box::new(metrics.unauthorized.clone()))?;
        registry.register(Box::new(metrics.up.clone()))?;
        registry.register(Box::new(metrics.writable.clone()))?;
        Ok(metrics)
    }
}
