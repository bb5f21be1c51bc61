//! The series of a process, and what each of them is.
//!
//! A [`Registry`] is prometheus' own, which also remembers the name, kind, labels and help of whatever is registered: a
//! series with labels has nothing to show before it is first used, and docs/metrics.md lists it all the same.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::proto::{MetricFamily, MetricType};

/// What one series is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    pub name: String,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    pub labels: Vec<String>,
    pub help: String,
}

/// Where the components of one process register their series. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    inner: prometheus::Registry,
    described: Arc<Mutex<Vec<Series>>>,
}

impl Registry {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// # Errors
    /// When a name is registered already.
    pub fn register(&self, collector: Box<dyn Collector>) -> prometheus::Result<()> {
        let families = collector.collect();
        let series: Vec<Series> = collector
            .desc()
            .into_iter()
            .map(|described| Series {
                name: described.fq_name.clone(),
                kind: kind(&described.fq_name, &families),
                labels: described.variable_labels.clone(),
                help: described.help.clone(),
            })
            .collect();
        self.inner.register(collector)?;
        self.described.lock().unwrap_or_else(PoisonError::into_inner).extend(series);
        Ok(())
    }

    /// What is shown now.
    #[must_use]
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.inner.gather()
    }

    /// Everything that was registered, by name.
    #[must_use]
    pub fn series(&self) -> Vec<Series> {
        let mut series = self.described.lock().unwrap_or_else(PoisonError::into_inner).clone();
        series.sort();
        series
    }
}

fn kind(name: &str, families: &[MetricFamily]) -> &'static str {
    match families.iter().find(|family| family.name() == name).map(MetricFamily::get_field_type) {
        Some(MetricType::COUNTER) => "counter",
        Some(MetricType::HISTOGRAM) => "histogram",
        Some(MetricType::SUMMARY) => "summary",
        Some(MetricType::GAUGE | MetricType::UNTYPED) | None => "gauge",
    }
}

#[cfg(test)]
mod tests {
    use prometheus::{HistogramOpts, HistogramVec, IntCounter};

    use super::*;

    #[test]
    fn what_is_registered_is_described_before_it_is_used() {
        let registry = Registry::new();
        let seconds = HistogramVec::new(HistogramOpts::new("b_seconds", "How long"), &["stage"]).unwrap();
        registry.register(Box::new(seconds)).unwrap();
        let counter = IntCounter::new("a_total", "How often").unwrap();
        registry.register(Box::new(counter.clone())).unwrap();
        assert!(registry.register(Box::new(counter)).is_err(), "twice");
        let series: Vec<_> =
            registry.series().into_iter().map(|one| (one.name, one.kind, one.labels, one.help)).collect();
        assert_eq!(
            series,
            [
                ("a_total".into(), "counter", vec![], "How often".into()),
                ("b_seconds".into(), "histogram", vec!["stage".into()], "How long".into()),
            ] as [(String, &str, Vec<String>, String); 2]
        );
        assert_eq!(registry.gather().len(), 1, "no stage has been seen");
    }
}
