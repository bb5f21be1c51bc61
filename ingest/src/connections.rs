//! How many database connections a consumer has, read when Prometheus asks.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGauge, IntGaugeVec, Opts};
use service::metrics::Registry;

use crate::database::Database;

struct Connections {
    database: Database,
    connections: IntGaugeVec,
    max: IntGauge,
}

/// Registers the series of one pool.
///
/// # Errors
/// When a name is registered already.
pub fn export(registry: &Registry, database: Database) -> Result<(), prometheus::Error> {
    registry.register(Box::new(database.refusals()))?;
    registry.register(Box::new(Connections {
        database,
        connections: IntGaugeVec::new(
            Opts::new(
                "ingest_database_connections",
                "Connections of the pool in use and idle, and callers that wait for one",
            ),
            &["state"],
        )?,
        max: IntGauge::new("ingest_database_connections_max", "Maximum number of connections in the pool")?,
    }))
}

impl Collector for Connections {
    fn desc(&self) -> Vec<&Desc> {
        self.connections.desc().into_iter().chain(self.max.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let status = self.database.status();
        let in_use = status.size.saturating_sub(status.available);
        for (state, count) in [("in_use", in_use), ("idle", status.available), ("waiting", status.waiting)] {
            self.connections.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.max.set(i64::try_from(status.max_size).unwrap_or(i64::MAX));
        self.connections.collect().into_iter().chain(self.max.collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use service::health::Health;

    use super::*;
    use crate::settings::DatabaseSettings;

    #[tokio::test]
    async fn an_unused_pool_has_no_connections_and_says_how_many_it_may_have() {
        let database =
            Database::new(&DatabaseSettings::default(), 3, Health::default().dependency("x")).unwrap();
        let registry = Registry::new();
        export(&registry, database).unwrap();
        let values: Vec<f64> = registry
            .gather()
            .iter()
            .flat_map(|family| family.get_metric().iter().map(|metric| metric.get_gauge().get_value()))
            .collect();
        // The counter of refused sessions comes last, and is no gauge.
        assert_eq!(values, [0.0, 0.0, 0.0, 3.0, 0.0]);
    }
}
