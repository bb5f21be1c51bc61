//! Medians, ratios, the table and the JSON document.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::Row;

/// What was measured so far, by row.
#[derive(Debug, Default)]
pub(super) struct Samples(BTreeMap<Row, Vec<f64>>);

impl Samples {
    pub(super) fn add(&mut self, row: Row, per_second: f64) {
        self.0.entry(row).or_default().push(per_second);
    }

    fn median(&self, row: Row) -> Option<f64> {
        let mut samples = self.0.get(&row)?.clone();
        samples.sort_by(f64::total_cmp);
        let upper = *samples.get(samples.len() / 2)?;
        let lower = *samples.get((samples.len() - 1) / 2)?;
        Some(f64::midpoint(lower, upper))
    }

    /// Broker and database share the cores, so the times per message add up.
    fn limit(&self, broker: Row) -> Option<f64> {
        Some(1.0 / (1.0 / self.median(broker)? + 1.0 / self.median(Row::Database)?))
    }

    fn figures(&self) -> Vec<(&'static str, Option<f64>)> {
        let mut figures: Vec<_> = Row::ALL.iter().map(|row| (row.key(), self.median(*row))).collect();
        figures.insert(3, ("limit_qos0", self.limit(Row::BrokerQos0)));
        figures.insert(4, ("limit_qos1", self.limit(Row::BrokerQos1)));
        figures
    }

    fn ratios(&self) -> Vec<(&'static str, Option<f64>)> {
        let ratio = |part: Option<f64>, whole: Option<f64>| Some(part? / whole?);
        let (qos0, qos1) = (self.median(Row::OursQos0), self.median(Row::OursQos1));
        vec![
            ("ours / limit, QoS 0", ratio(qos0, self.limit(Row::BrokerQos0))),
            ("ours / limit, QoS 1", ratio(qos1, self.limit(Row::BrokerQos1))),
            ("ours / baseline", ratio(qos1, self.median(Row::Baseline))),
        ]
    }

    pub(super) fn table(&self) -> String {
        let mut text = String::from("\nmedians, messages or rows per second\n");
        for (name, value) in self.figures().into_iter().filter_map(|(name, value)| Some((name, value?))) {
            writeln!(text, "  {name:<22} {value:>10.0}").unwrap_or_default();
        }
        for (name, value) in self.ratios().into_iter().filter_map(|(name, value)| Some((name, value?))) {
            writeln!(text, "  {name:<22} {value:>10.2}").unwrap_or_default();
        }
        text
    }

    /// The medians under their keys; rows not measured are absent.
    pub(super) fn json(&self) -> Value {
        let figures =
            self.figures().into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value?))));
        Value::Object(figures.collect::<Map<_, _>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_limits_come_from_what_was_measured() {
        let mut samples = Samples::default();
        for rate in [100.0, 300.0, 200.0] {
            samples.add(Row::BrokerQos1, rate);
        }
        for rate in [100.0, 300.0] {
            samples.add(Row::Database, rate);
        }
        samples.add(Row::OursQos1, 95.0);
        let json = samples.json();
        assert_eq!(json["broker_qos1"], json!(200.0));
        assert_eq!(json["database"], json!(200.0));
        assert_eq!(json["limit_qos1"], json!(100.0));
        assert!(json.get("ours_qos0").is_none());
        assert!(samples.table().contains("ours / limit, QoS 1          0.95"), "{}", samples.table());
    }
}
