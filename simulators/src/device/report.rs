//! The ledger and the summary of a run, from the snapshots of its connections.

use std::collections::BTreeMap;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use wire::fleet::Device;
use wire::ledger::Tally;

use super::account::{Snapshot, Totals};
use super::publisher::Traffic;
use super::settings::FleetSettings;
use super::trouble::{FLAWS, REASONS};

/// Everything the connections know at one moment, in the order of their numbers.
#[derive(Debug)]
pub struct Books {
    pub seed: u64,
    pub qos: u8,
    pub complete: bool,
    pub started_us: i64,
    pub ended_us: i64,
    pub connections: Vec<Snapshot>,
    pub traffic: Vec<Traffic>,
}

/// Written as a `wire::ledger::Ledger`, without building its maps: 100,000 devices would cost 20 MB each time.
impl Serialize for Books {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let totals = self.totals();
        let mut ledger = serializer.serialize_struct("Ledger", 15)?;
        ledger.serialize_field("seed", &self.seed)?;
        ledger.serialize_field("complete", &self.complete)?;
        ledger.serialize_field("qos", &self.qos)?;
        ledger.serialize_field("started_us", &self.started_us)?;
        ledger.serialize_field("ended_us", &self.ended_us)?;
        ledger.serialize_field("acknowledged", &totals.acknowledged)?;
        ledger.serialize_field("repeated", &totals.repeated)?;
        ledger.serialize_field("devices", &Devices(self))?;
        ledger.serialize_field("dead_letters", &dead_letters(&totals))?;
        ledger.serialize_field("unknown", &Unknown(self))?;
        ledger.serialize_field("unknown_dead_letters", &totals.unknown_dead_letters)?;
        ledger.serialize_field("refused", &self.refused())?;
        ledger.serialize_field("skipped", &self.sum(|traffic| traffic.skipped))?;
        ledger.serialize_field("resent", &self.sum(|traffic| traffic.resent))?;
        ledger.serialize_field("trouble", &trouble(&totals))?;
        ledger.end()
    }
}

impl Books {
    /// Sums over all connections.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.connections.iter().fold(Totals::default(), |mut sum, snapshot| {
            let totals = &snapshot.totals;
            sum.acknowledged += totals.acknowledged;
            sum.repeated += totals.repeated;
            sum.unknown_dead_letters += totals.unknown_dead_letters;
            for (sum, count) in sum.dead_letters.iter_mut().zip(totals.dead_letters) {
                *sum += count;
            }
            for (sum, count) in sum.flaws.iter_mut().zip(totals.flaws) {
                *sum += count;
            }
            sum
        })
    }

    /// Devices with at least one accepted reading, by number.
    fn tallies(&self) -> impl Iterator<Item = (u32, &Tally)> {
        let stride = self.connections.len();
        self.connections.iter().enumerate().flat_map(move |(connection, snapshot)| {
            snapshot.tallies.iter().enumerate().filter(|(_, tally)| tally.count > 0).map(
                move |(row, tally)| (u32::try_from(row * stride + connection).unwrap_or(u32::MAX), tally),
            )
        })
    }

    fn sum(&self, count: impl Fn(&Traffic) -> u64) -> u64 {
        self.traffic.iter().map(count).sum()
    }

    fn refused(&self) -> BTreeMap<&'static str, u64> {
        let mut refused = BTreeMap::new();
        for (reason, count) in self.traffic.iter().flat_map(|traffic| &traffic.refused) {
            *refused.entry(*reason).or_default() += count;
        }
        refused
    }

    fn readings(&self) -> u64 {
        self.tallies().map(|(_, tally)| tally.count).sum()
    }

    fn unknown(&self) -> u64 {
        self.connections.iter().map(|snapshot| snapshot.unknown.len() as u64).sum()
    }
}

struct Devices<'a>(&'a Books);

impl Serialize for Devices<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer
            .collect_map(self.0.tallies().map(|(number, tally)| (Device::new(number).device_id(), tally)))
    }
}

struct Unknown<'a>(&'a Books);

impl Serialize for Unknown<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = self.0.connections.iter().flat_map(|snapshot| &snapshot.unknown);
        serializer.collect_seq(all.map(|(number, at)| (Device::new(*number).device_id(), at)))
    }
}

fn dead_letters(totals: &Totals) -> BTreeMap<&'static str, u64> {
    REASONS.into_iter().zip(totals.dead_letters).filter(|(_, count)| *count > 0).collect()
}

fn trouble(totals: &Totals) -> BTreeMap<&'static str, u64> {
    FLAWS.into_iter().zip(totals.flaws).filter(|(_, count)| *count > 0).collect()
}

/// The end of a run in numbers: `--summary`.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub devices: u32,
    pub seed: u64,
    pub qos: u8,
    /// From the first message to the last acknowledgement.
    pub seconds: f64,
    /// Messages written, retries and repeats included.
    pub sent: u64,
    /// Messages that the broker accepted (QoS 0: written).
    pub acknowledged: u64,
    /// Acknowledged messages per second.
    pub rate_per_s: f64,
    /// Distinct good readings accepted.
    pub readings: u64,
    pub repeated: u64,
    pub resent: u64,
    pub skipped: u64,
    pub refused: BTreeMap<&'static str, u64>,
    pub dead_letters: BTreeMap<&'static str, u64>,
    /// Accepted messages with something wrong on purpose.
    pub trouble: BTreeMap<&'static str, u64>,
    /// Good readings without an answer, and attempts at bad messages without one.
    pub unknown: u64,
    pub unknown_dead_letters: u64,
    pub reconnects: u64,
}

impl Summary {
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a rate needs no 64 bits")]
    pub fn new(settings: &FleetSettings, books: &Books, reconnects: u64) -> Self {
        let totals = books.totals();
        let traffic = &books.traffic;
        let first = traffic.iter().filter_map(|traffic| traffic.first_sent).min().unwrap_or_default();
        let last = traffic.iter().filter_map(|traffic| traffic.last_accepted).max().unwrap_or_default();
        let seconds = last.saturating_sub(first).as_secs_f64();
        Self {
            devices: settings.devices,
            seed: settings.seed,
            qos: settings.qos,
            seconds,
            sent: books.sum(|traffic| traffic.sent),
            acknowledged: totals.acknowledged,
            rate_per_s: if seconds > 0.0 { totals.acknowledged as f64 / seconds } else { 0.0 },
            readings: books.readings(),
            repeated: totals.repeated,
            resent: books.sum(|traffic| traffic.resent),
            skipped: books.sum(|traffic| traffic.skipped),
            refused: books.refused(),
            dead_letters: dead_letters(&totals),
            trouble: trouble(&totals),
            unknown: books.unknown(),
            unknown_dead_letters: totals.unknown_dead_letters,
            reconnects,
        }
    }

    /// One line for people.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!(
            "{} messages acknowledged in {:.1} s ({:.0}/s), {} distinct readings",
            self.acknowledged, self.seconds, self.rate_per_s, self.readings
        );
        let refused: u64 = self.refused.values().sum();
        let dead: u64 = self.dead_letters.values().sum();
        for (count, what) in [
            (self.repeated, "repeated"),
            (dead, "to become dead letters"),
            (refused, "REFUSED by the broker"),
            (self.skipped, "SKIPPED, behind schedule"),
            (self.resent, "sent again after reconnects"),
            (self.unknown + self.unknown_dead_letters, "without an answer"),
        ] {
            if count > 0 {
                line.push_str(&format!(", {count} {what}"));
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use wire::ledger::Ledger;

    fn books() -> Books {
        let settings = FleetSettings { devices: 10, connections: 3, ..FleetSettings::default() };
        let connections = (0..3).map(|connection| {
            let mut account = super::super::account::Account::new(&settings, connection);
            let accepted: Vec<_> = (0..4 + i64::from(connection))
                .map(|n| account.next(1_770_091_506_000_000 + n * 1000).unwrap())
                .collect();
            accepted.iter().for_each(|message| account.accept(message, Duration::ZERO));
            account.snapshot(accepted.iter().take(1), std::iter::empty())
        });
        Books {
            seed: 7,
            qos: 1,
            complete: true,
            started_us: 1,
            ended_us: 2,
            connections: connections.collect(),
            traffic: Vec::new(),
        }
    }

    #[test]
    fn what_is_written_is_a_ledger_with_every_reading_under_its_device() {
        let books = books();
        let ledger: Ledger = serde_json::from_str(&serde_json::to_string(&books).unwrap()).unwrap();
        assert_eq!(ledger.readings(), 15);
        assert_eq!((ledger.acknowledged, ledger.seed, ledger.complete), (15, 7, true));
        assert_eq!(ledger.devices.len(), 10);
        // Connection 0 has devices 0, 3, 6, 9 and made 4 readings; connection 2 has 2, 5, 8 and made 6.
        let count = |number| ledger.devices[&Device::new(number).device_id()].count;
        assert_eq!([0, 3, 6, 9].map(count), [1, 1, 1, 1]);
        assert_eq!([1, 4, 7].map(count), [2, 2, 1]);
        assert_eq!([2, 5, 8].map(count), [2, 2, 2]);
        assert_eq!(ledger.unknown.len(), 3);
        assert_eq!(ledger.unknown[1].0, Device::new(1).device_id());
        assert_eq!((ledger.skipped, ledger.refused.len(), ledger.trouble.len()), (0, 0, 0));
    }

    #[test]
    fn the_summary_adds_up_and_names_only_what_happened() {
        let traffic = Traffic {
            sent: 16,
            first_sent: Some(Duration::from_secs(1)),
            last_accepted: Some(Duration::from_secs(4)),
            refused: [("quota_exceeded", 2)].into(),
            ..Traffic::default()
        };
        let books = Books { traffic: vec![traffic.clone(), Traffic { skipped: 5, ..traffic }], ..books() };
        let ledger: Ledger = serde_json::from_str(&serde_json::to_string(&books).unwrap()).unwrap();
        assert_eq!((ledger.skipped, ledger.refused["quota_exceeded"]), (5, 4));
        let summary = Summary::new(&FleetSettings::default(), &books, 0);
        assert_eq!((summary.sent, summary.acknowledged, summary.readings, summary.unknown), (32, 15, 15, 3));
        assert!((summary.rate_per_s - 5.0).abs() < 1e-9);
        let line = summary.line();
        assert!(line.starts_with("15 messages acknowledged in 3.0 s (5/s), 15 distinct readings"), "{line}");
        assert!(
            line.contains("4 REFUSED") && line.contains("3 without") && line.contains("5 SKIPPED"),
            "{line}"
        );
        assert!(!line.contains("repeated") && !line.contains("sent again"), "{line}");
    }
}
