//! How many readings came from which site and device type: a sender that falls silent is seen here, and only here.
//!
//! Counted by topic, once a message, while a batch is filled; exported when it is committed. Never a label per device, and
//! never more than [`MAX_PAIRS`] labels whatever topics strangers make up.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{IntCounterVec, Opts};
use service::metrics::Registry;
use wire::topic::Topic;

/// Sites times types that get a label of their own; each is a series in Prometheus for as long as this process lives.
const MAX_PAIRS: usize = 1000;
/// What those beyond are counted as.
const OTHER: &str = "other";

/// Readings of one batch by site and type.
#[derive(Debug, Default)]
pub struct SiteCounts {
    /// By site, then type: looked up without a copy of either.
    counts: HashMap<Box<str>, HashMap<Box<str>, u64>>,
}

impl SiteCounts {
    /// Adds the readings of one message.
    pub fn add(&mut self, topic: &Topic<'_>, readings: usize) {
        if readings == 0 {
            return;
        }
        let known = self.counts.get_mut(topic.site_id).and_then(|types| types.get_mut(topic.device_type));
        match known {
            Some(count) => *count += readings as u64,
            None => {
                let types = self.counts.entry(topic.site_id.into()).or_default();
                types.insert(topic.device_type.into(), readings as u64);
            }
        }
    }

    pub fn clear(&mut self) {
        self.counts.clear();
    }

    /// Site, type, readings.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.counts.iter().flat_map(|(site, types)| {
            types.iter().map(move |(kind, count)| (site.as_ref(), kind.as_ref(), *count))
        })
    }
}

/// `ingest_readings_total{site_id, device_type}`.
#[derive(Debug, Clone)]
pub struct Readings {
    counter: IntCounterVec,
    known: Arc<Mutex<HashSet<(String, String)>>>,
}

impl Readings {
    /// # Errors
    /// When the name is registered already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts =
            Opts::new("ingest_readings_total", "Valid readings in committed batches, by site and type");
        let counter = IntCounterVec::new(opts, &["site_id", "device_type"])?;
        registry.register(Box::new(counter.clone()))?;
        Ok(Self { counter, known: Arc::default() })
    }

    /// Adds those of a committed batch.
    pub fn add<'c>(&self, site_counts: impl Iterator<Item = (&'c str, &'c str, u64)>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (site, kind, count) in site_counts {
            let pair = (site.to_owned(), kind.to_owned());
            let labels = if known.contains(&pair) || known.len() < MAX_PAIRS {
                known.insert(pair);
                [site, kind]
            } else {
                [OTHER, OTHER]
            };
            self.counter.with_label_values(&labels).inc_by(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_and_types_are_counted_and_strangers_share_one_label() {
        let registry = Registry::new();
        let readings = Readings::new(&registry).unwrap();
        let mut site_counts = SiteCounts::default();
        for (device, count) in [("T-1", 2), ("T-2", 1), ("T-3", 0)] {
            let topic = format!("og/field/WY-ALPHA/turbine/{device}");
            site_counts.add(&Topic::parse(topic.as_bytes()).unwrap(), count);
        }
        readings.add(site_counts.iter());
        for number in 0..2 * MAX_PAIRS {
            readings.add([("made-up", number.to_string().as_str(), 1)].into_iter());
        }
        readings.add(site_counts.iter());
        assert_eq!(readings.counter.with_label_values(&["WY-ALPHA", "turbine"]).get(), 6);
        assert_eq!(readings.counter.with_label_values(&[OTHER, OTHER]).get(), MAX_PAIRS as u64 + 1);
        let series = registry.gather().iter().map(|family| family.get_metric().len()).sum::<usize>();
        assert_eq!(series, MAX_PAIRS + 1);
    }
}
