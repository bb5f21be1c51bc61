//! Reading what `/metrics` says: the Prometheus text format, as much of it as our processes write.

use std::collections::BTreeMap;

use anyhow::{Context, bail};

/// One scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// # Errors
    /// When a line is neither a comment nor a sample.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines
            .map(|line| sample(line).with_context(|| format!("not a Prometheus sample: {line}")))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { samples })
    }

    /// The sum over all label values; 0 when there is no such series.
    #[must_use]
    pub fn sum(&self, name: &str) -> f64 {
        self.named(name).map(|sample| sample.value).sum()
    }

    /// As [`Metrics::sum`], for counts.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count: whole and not negative"
    )]
    pub fn count(&self, name: &str) -> u64 {
        self.sum(name).max(0.0) as u64
    }

    /// The value of the series whose label has this value; `None` when there is none.
    #[must_use]
    pub fn labelled(&self, name: &str, label: &str, value: &str) -> Option<f64> {
        self.named(name)
            .find(|sample| sample.labels.get(label).is_some_and(|found| found == value))
            .map(|sample| sample.value)
    }

    /// All series of a name by the value of one label, zeros left out.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count: whole and not negative"
    )]
    pub fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for sample in self.named(name) {
            if let Some(value) = sample.labels.get(label)
                && sample.value > 0.0
            {
                *counts.entry(value.clone()).or_default() += sample.value as u64;
            }
        }
        counts
    }

    /// Both scrapes as one, for counters of processes that followed one another; sums add up.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self { samples: self.samples.iter().chain(&other.samples).cloned().collect() }
    }

    /// Whether a series of this name was exported.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.named(name).next().is_some()
    }

    /// A histogram, summed over all other labels.
    #[must_use]
    pub fn histogram(&self, name: &str) -> Histogram {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for sample in self.named(&format!("{name}_bucket")) {
            let Some(bound) = sample.labels.get("le").and_then(|le| number(le)) else { continue };
            match buckets.iter_mut().find(|(known, _)| *known == bound) {
                Some((_, count)) => *count += sample.value,
                None => buckets.push((bound, sample.value)),
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        Histogram {
            buckets,
            sum: self.sum(&format!("{name}_sum")),
            count: self.sum(&format!("{name}_count")),
        }
    }

    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| sample.name == name)
    }
}

/// Cumulative buckets: (upper bound, observations up to it).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    pub buckets: Vec<(f64, f64)>,
    pub sum: f64,
    pub count: f64,
}

impl Histogram {
    /// What was observed between an earlier scrape and this one. A restarted process starts from 0 again.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        if earlier.count > self.count || earlier.buckets.len() != self.buckets.len() {
            return self.clone();
        }
        let buckets = self.buckets.iter().zip(&earlier.buckets);
        Self {
            buckets: buckets.map(|((bound, now), (_, before))| (*bound, now - before)).collect(),
            sum: self.sum - earlier.sum,
            count: self.count - earlier.count,
        }
    }

    /// The value below which a share `q` of the observations lies, straight between the bucket's bounds (as
    /// Prometheus does it); `None` without observations. In the last, open bucket: its lower bound.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<f64> {
        if self.count <= 0.0 {
            return None;
        }
        let wanted = self.count * q;
        let (mut lower, mut below) = (0.0, 0.0);
        for (bound, count) in &self.buckets {
            if *count >= wanted && *count > below {
                if bound.is_infinite() {
                    return Some(lower);
                }
                return Some(lower + (bound - lower) * ((wanted - below) / (count - below)).clamp(0.0, 1.0));
            }
            (lower, below) = (*bound, *count);
        }
        Some(lower)
    }

    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }
}

fn sample(line: &str) -> anyhow::Result<Sample> {
    let (name, labels, rest) = match line.split_once('{') {
        None => {
            let (name, rest) = line.split_once(' ').context("no value")?;
            (name, BTreeMap::new(), rest)
        }
        Some((name, rest)) => {
            let (labels, rest) = labels(rest)?;
            (name, labels, rest)
        }
    };
    let value = rest.split_ascii_whitespace().next().and_then(number).context("no value")?;
    Ok(Sample { name: name.to_owned(), labels, value })
}

/// `a="x",b="y"} 1` gives the labels and ` 1`.
fn labels(mut rest: &str) -> anyhow::Result<(BTreeMap<String, String>, &str)> {
    let mut found = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Ok((found, rest));
        }
        let (name, quoted) = rest.split_once("=\"").context("a label has no value")?;
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        rest = loop {
            match characters.next() {
                Some((at, '"')) => break quoted.get(at + 1..).unwrap_or_default(),
                Some((_, '\\')) => match characters.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, other)) => value.push(other),
                    None => bail!("a label ends in a backslash"),
                },
                Some((_, other)) => value.push(other),
                None => bail!("a label is not closed"),
            }
        };
        found.insert(name.to_owned(), value);
    }
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        other => other.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP x y\n# TYPE x counter\nreceived_total 12\n\
        dead_total{reason=\"not_json\"} 2\ndead_total{reason=\"a \\\"b\\\" }\\n,\"} 3 1700000000\ndead_total{reason=\"zero\"} 0\n\
        lag_bucket{le=\"0.1\"} 50\nlag_bucket{le=\"1\"} 90\nlag_bucket{le=\"+Inf\"} 100\nlag_sum 70.5\nlag_count 100\n";

    #[test]
    fn reads_samples_and_labels() {
        let metrics = Metrics::parse(TEXT).unwrap();
        assert_eq!(metrics.count("received_total"), 12);
        assert_eq!(metrics.count("dead_total"), 5);
        assert_eq!(metrics.labelled("dead_total", "reason", "not_json"), Some(2.0));
        assert_eq!(
            metrics.by_label("dead_total", "reason").into_keys().collect::<Vec<_>>(),
            ["a \"b\" }\n,", "not_json"]
        );
        assert!(!metrics.has("absent"));
        assert_eq!(metrics.count("absent"), 0);
        assert!(Metrics::parse("nonsense").is_err());
        assert!(Metrics::parse("a{b=\"c} 1").is_err());
    }

    #[test]
    fn quantiles_lie_between_the_bounds() {
        let histogram = Metrics::parse(TEXT).unwrap().histogram("lag");
        assert_eq!(histogram.quantile(0.25), Some(0.05));
        assert!((histogram.quantile(0.7).unwrap() - 0.55).abs() < 1e-9);
        assert_eq!(histogram.quantile(0.99), Some(1.0), "the open bucket counts as its lower bound");
        assert_eq!(Histogram::default().quantile(0.5), None);
        assert_eq!(histogram.since(&histogram).quantile(0.5), None);
    }
}
