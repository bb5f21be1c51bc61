//! Is what the broker acknowledged in the table, once, on every node? For each device, not in sum.
//!
//! [`compare`] is a pure function of a [`Ledger`] and what one node stored; [`stored`] asks the node. Nothing here
//! repairs anything or writes to the database.

pub mod sessions;
pub mod stored;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use wire::ledger::{Ledger, Tally};

use sessions::SessionFindings;
use stored::Stored;

/// Devices listed in a report, of those that differ.
const LISTED: usize = 10;

/// What one node holds, held against the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    pub node: String,
    /// Rows in scope.
    pub rows: u64,
    /// Distinct identities (device, timestamp) among them, counted, not assumed.
    pub distinct: u64,
    /// Rows whose message was sent and never acknowledged: they may be stored or not.
    pub unacknowledged: u64,
    /// Acknowledged readings that are not stored.
    pub lost: u64,
    /// Rows nobody acknowledged or sent.
    pub extra: u64,
    /// Devices with the right number of rows and a wrong timestamp among them.
    pub altered: u64,
    /// All devices that differ in any way.
    pub differing: u64,
    /// The first of them.
    pub examples: Vec<Difference>,
    /// Dead letters by reason.
    pub dead_letters: BTreeMap<String, u64>,
    /// Acknowledged messages that are neither rows nor dead letters, by the reason they should have been given.
    pub dead_letters_lost: u64,
    /// Dead letters beyond those that were acknowledged or in doubt: a good reading refused, or one recorded twice.
    pub dead_letters_extra: u64,
    /// Acknowledged readings of devices whose first ones are older than the retention, and that are not stored: dropped
    /// by design or lost, which nobody can tell any more.
    pub outside_retention: u64,
    /// The ledger is a snapshot from mid-run: more may be stored than it says, so only losses are found.
    pub incomplete_ledger: bool,
    /// QoS 0: nothing was acknowledged, so a loss breaks no promise.
    pub qos0: bool,
}

/// One device whose stored readings are not those acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    pub device_id: String,
    pub acknowledged: Option<Tally>,
    pub stored: Option<Tally>,
}

impl Findings {
    /// Whether this node keeps the promise.
    #[must_use]
    pub fn holds(&self) -> bool {
        let lost = !self.qos0 && (self.lost > 0 || self.dead_letters_lost > 0);
        let repeated = self.distinct != self.rows;
        !lost && !repeated && self.extra == 0 && self.altered == 0 && self.dead_letters_extra == 0
    }

    /// `exact`, or what is wrong in a few words.
    #[must_use]
    pub fn verdict(&self) -> String {
        let mut wrong = Vec::new();
        for (count, text) in [
            (self.lost, "lost"),
            (self.extra, "extra"),
            (self.rows.saturating_sub(self.distinct), "stored twice"),
            (self.altered, "devices altered"),
            (self.dead_letters_lost, "dead letters lost"),
            (self.dead_letters_extra, "dead letters extra"),
        ] {
            if count > 0 {
                wrong.push(
                    if text.starts_with("dead") || text.starts_with("dev") || text.starts_with("stored") {
                        format!("{count} {text}")
                    } else {
                        format!("{text} {count}")
                    },
                );
            }
        }
        if self.outside_retention > 0 {
            let found = if wrong.is_empty() { "nothing wrong".to_owned() } else { wrong.join(", ") };
            return format!("{found}; {} outside the retention, not checked", self.outside_retention);
        }
        match (wrong.is_empty(), self.incomplete_ledger, self.qos0) {
            (true, false, _) => "exact".into(),
            (true, true, _) => "nothing lost (incomplete ledger)".into(),
            (false, _, true) => format!("{} (QoS 0)", wrong.join(", ")),
            (false, _, false) => wrong.join(", "),
        }
    }
}

/// Every node's findings and the verdict over them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Messages the broker acknowledged, of every kind.
    pub acknowledged: u64,
    /// Distinct good readings among them.
    pub readings: u64,
    pub devices: u64,
    pub nodes: Vec<Findings>,
    /// User sessions, when the run had any.
    pub sessions: Vec<SessionFindings>,
}

impl Report {
    #[must_use]
    pub fn new(ledger: &Ledger, nodes: Vec<Findings>) -> Self {
        let devices = u64::try_from(ledger.devices.len()).unwrap_or(u64::MAX);
        Self {
            acknowledged: ledger.acknowledged,
            readings: ledger.readings(),
            devices,
            nodes,
            sessions: Vec::new(),
        }
    }

    /// The same with what was found of the user sessions.
    #[must_use]
    pub fn with_sessions(self, sessions: Vec<SessionFindings>) -> Self {
        Self { sessions, ..self }
    }

    /// Whether the promise is kept on every node.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.nodes.is_empty()
            && self.nodes.iter().all(Findings::holds)
            && self.sessions.iter().all(SessionFindings::holds)
    }

    /// `exact` when it is so on every node; else each node that differs with what is wrong there.
    #[must_use]
    pub fn verdict(&self) -> String {
        let mut verdicts: Vec<(String, &str)> =
            self.nodes.iter().map(|node| (node.verdict(), node.node.as_str())).collect();
        let sessions = self.sessions.iter().filter(|node| !node.holds());
        verdicts.extend(sessions.map(|node| (node.verdict(), node.node.as_str())));
        match verdicts.split_first() {
            None => "no node was looked at".into(),
            Some(((first, _), rest)) if rest.iter().all(|(verdict, _)| verdict == first) => first.clone(),
            Some(_) => {
                verdicts.retain(|(verdict, _)| verdict != "exact");
                let each: Vec<String> =
                    verdicts.into_iter().map(|(verdict, node)| format!("{node}: {verdict}")).collect();
                each.join("; ")
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "acknowledged {} messages: {} distinct readings of {} devices",
            self.acknowledged, self.readings, self.devices
        )?;
        for node in &self.nodes {
            writeln!(
                f,
                "{:<10} {} rows, {} distinct, {} devices differ: {}",
                node.node,
                node.rows,
                node.distinct,
                node.differing,
                node.verdict()
            )?;
            if node.unacknowledged > 0 {
                writeln!(
                    f,
                    "{:<10} {} rows of messages that were not acknowledged",
                    "", node.unacknowledged
                )?;
            }
            for (reason, count) in &node.dead_letters {
                writeln!(f, "{:<10} {count} dead letters: {reason}", "")?;
            }
            for example in &node.examples {
                writeln!(f, "{:<10} {example}", "")?;
            }
        }
        for node in &self.sessions {
            writeln!(f, "{node}")?;
        }
        write!(f, "verdict: {}", self.verdict())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |tally: Option<Tally>| match tally {
            None => "nothing".to_owned(),
            Some(tally) => {
                format!(
                    "{} ({} .. {}, checksum {})",
                    tally.count, tally.first_us, tally.last_us, tally.checksum
                )
            }
        };
        write!(
            f,
            "{}: acknowledged {}, stored {}",
            self.device_id,
            show(self.acknowledged),
            show(self.stored)
        )
    }
}

/// Holds what a node stored against the ledger.
#[must_use]
pub fn compare(node: &str, ledger: &Ledger, stored: &Stored) -> Findings {
    let mut findings = Findings {
        node: node.to_owned(),
        rows: stored.rows,
        distinct: stored.distinct,
        unacknowledged: stored.unacknowledged,
        dead_letters: stored.dead_letters.clone(),
        incomplete_ledger: !ledger.complete,
        qos0: ledger.qos == 0,
        ..Findings::default()
    };
    let ids =
        ledger.devices.keys().chain(stored.devices.keys().filter(|id| !ledger.devices.contains_key(*id)));
    for id in ids {
        let (acknowledged, found) = (ledger.devices.get(id).copied(), stored.devices.get(id).copied());
        let (expected, there) = (acknowledged.unwrap_or_default(), found.unwrap_or_default());
        let partly_dropped =
            expected.count > 0 && stored.horizon_us.is_some_and(|horizon| expected.first_us < horizon);
        let differs = if partly_dropped {
            weigh_the_end(&mut findings, expected, there, stored.horizon_us.unwrap_or(i64::MIN))
        } else {
            weigh(&mut findings, expected, there)
        };
        if differs {
            findings.differing += 1;
            if findings.examples.len() < LISTED {
                findings.examples.push(Difference { device_id: id.clone(), acknowledged, stored: found });
            }
        }
    }
    let reasons = ledger.dead_letters.keys().chain(stored.dead_letters.keys());
    let reasons: std::collections::BTreeSet<&String> = reasons.collect();
    for reason in reasons {
        let expected = ledger.dead_letters.get(reason).copied().unwrap_or(0);
        let found = stored.dead_letters.get(reason).copied().unwrap_or(0);
        findings.dead_letters_lost += expected.saturating_sub(found);
        if ledger.complete {
            findings.dead_letters_extra += found.saturating_sub(expected);
        }
    }
    findings.dead_letters_extra = findings.dead_letters_extra.saturating_sub(ledger.unknown_dead_letters);
    findings
}

/// Adds one device; says whether it differs.
fn weigh(findings: &mut Findings, acknowledged: Tally, stored: Tally) -> bool {
    match stored.count.cmp(&acknowledged.count) {
        std::cmp::Ordering::Less => findings.lost += acknowledged.count - stored.count,
        std::cmp::Ordering::Greater if findings.incomplete_ledger => return false,
        std::cmp::Ordering::Greater => findings.extra += stored.count - acknowledged.count,
        std::cmp::Ordering::Equal if stored == acknowledged => return false,
        std::cmp::Ordering::Equal => findings.altered += 1,
    }
    true
}

/// As [`weigh`] for a device whose first readings may have been dropped: what is missing cannot be told from what was
/// dropped, so it is counted apart; more rows than readings, or a newest one that is not there, are wrong all the same.
fn weigh_the_end(findings: &mut Findings, acknowledged: Tally, stored: Tally, horizon_us: i64) -> bool {
    if stored.count > acknowledged.count {
        return weigh(findings, acknowledged, stored);
    }
    let mut missing = acknowledged.count - stored.count;
    let newest_kept = acknowledged.last_us >= horizon_us;
    let newest_stored = stored.count > 0 && stored.last_us >= acknowledged.last_us;
    let lost = newest_kept && !newest_stored;
    if lost {
        findings.lost += 1;
        missing -= 1;
    }
    findings.outside_retention += missing;
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(times: &[i64]) -> Tally {
        let mut tally = Tally::default();
        times.iter().for_each(|time| tally.add(*time));
        tally
    }

    fn devices<'a>(devices: impl IntoIterator<Item = (&'a str, &'a [i64])>) -> BTreeMap<String, Tally> {
        devices.into_iter().map(|(id, times)| (id.to_owned(), tally(times))).collect()
    }

    fn ledger() -> Ledger {
        Ledger {
            complete: true,
            qos: 1,
            acknowledged: 6,
            devices: devices([("a", &[1_000_000, 2_000_000, 3_000_000][..]), ("b", &[5_000_000])]),
            dead_letters: [("not_json".to_owned(), 2)].into(),
            unknown_dead_letters: 1,
            ..Ledger::default()
        }
    }

    fn stored(a: &[i64], b: &[i64]) -> Stored {
        let rows = u64::try_from(a.len() + b.len()).unwrap();
        Stored {
            rows,
            distinct: rows,
            devices: devices([("a", a), ("b", b)].into_iter().filter(|(_, times)| !times.is_empty())),
            dead_letters: [("not_json".to_owned(), 2)].into(),
            ..Stored::default()
        }
    }

    const GOOD: (&[i64], &[i64]) = (&[1_000_000, 2_000_000, 3_000_000], &[5_000_000]);

    #[test]
    fn every_difference_has_its_verdict() {
        let cases: [(&[i64], &[i64], &str); 6] = [
            (GOOD.0, GOOD.1, "exact"),
            (&[1_000_000, 3_000_000], GOOD.1, "lost 1"),
            (GOOD.0, &[], "lost 1"),
            (&[1_000_000, 2_000_000, 3_000_000, 4_000_000], GOOD.1, "extra 1"),
            (&[1_000_000, 2_000_001, 3_000_000], GOOD.1, "1 devices altered"),
            (&[1_000_000], &[5_000_000, 6_000_000], "lost 2, extra 1"),
        ];
        for (a, b, verdict) in cases {
            let findings = compare("region1", &ledger(), &stored(a, b));
            assert_eq!(findings.verdict(), verdict);
            assert_eq!(findings.holds(), verdict == "exact", "{verdict}");
            assert_eq!(findings.examples.is_empty(), verdict == "exact");
        }
    }

    #[test]
    fn a_device_nobody_sent_for_is_extra() {
        let mut found = stored(GOOD.0, GOOD.1);
        found.devices.insert("ghost".into(), tally(&[7]));
        let findings = compare("region1", &ledger(), &found);
        assert_eq!((findings.verdict(), findings.differing), ("extra 1".into(), 1));
        assert_eq!(findings.examples[0].device_id, "ghost");
    }

    #[test]
    fn repeated_rows_and_dead_letters_count() {
        let mut found = stored(GOOD.0, GOOD.1);
        found.distinct -= 1;
        assert_eq!(compare("x", &ledger(), &found).verdict(), "1 stored twice");
        for (letters, verdict) in
            [(1, "1 dead letters lost"), (2, "exact"), (3, "exact"), (4, "1 dead letters extra")]
        {
            let mut found = stored(GOOD.0, GOOD.1);
            found.dead_letters = [("not_json".to_owned(), letters)].into();
            assert_eq!(compare("x", &ledger(), &found).verdict(), verdict);
        }
    }

    #[test]
    fn a_snapshot_proves_losses_only_and_qos_0_promises_nothing() {
        let snapshot = Ledger { complete: false, ..ledger() };
        let more = stored(&[1_000_000, 2_000_000, 3_000_000, 4_000_000], GOOD.1);
        assert!(compare("x", &snapshot, &more).holds());
        assert!(!compare("x", &snapshot, &stored(&[], GOOD.1)).holds());
        let qos0 = Ledger { qos: 0, ..ledger() };
        let findings = compare("x", &qos0, &stored(&[], GOOD.1));
        assert!(findings.holds());
        assert_eq!(findings.verdict(), "lost 3 (QoS 0)");
        assert!(!compare("x", &qos0, &more).holds(), "but nothing may be made up");
    }

    #[test]
    fn what_the_retention_dropped_is_counted_and_never_called_exact_or_lost() {
        // "a" began before the horizon, "b" did not.
        let horizon =
            |horizon_us: i64| move |stored: Stored| Stored { horizon_us: Some(horizon_us), ..stored };
        let look = |a: &[i64], b: &[i64], us: i64| compare("x", &ledger(), &horizon(us)(stored(a, b)));
        for (a, b, us, verdict, holds) in [
            (GOOD.0, GOOD.1, 1_000_000, "exact", true),
            (GOOD.0, GOOD.1, 1_500_000, "exact", true),
            (
                &[2_000_000, 3_000_000][..],
                GOOD.1,
                1_500_000,
                "nothing wrong; 1 outside the retention, not checked",
                true,
            ),
            (&[3_000_000], GOOD.1, 1_500_000, "nothing wrong; 2 outside the retention, not checked", true),
            // The newest one is young enough to be there.
            (&[2_000_000], GOOD.1, 1_500_000, "lost 1; 1 outside the retention, not checked", false),
            (&[], GOOD.1, 1_500_000, "lost 1; 2 outside the retention, not checked", false),
            (&[], GOOD.1, 4_000_000, "nothing wrong; 3 outside the retention, not checked", true),
            (&[3_000_000], &[], 1_500_000, "lost 1; 2 outside the retention, not checked", false),
            (&[1_000_000, 2_000_000, 3_000_000, 4_000_000], GOOD.1, 1_500_000, "extra 1", false),
        ] {
            let findings = look(a, b, us);
            assert_eq!((findings.verdict().as_str(), findings.holds()), (verdict, holds), "{a:?} {us}");
        }
    }

    #[test]
    fn the_report_names_the_node_that_differs() {
        let good = compare("region1", &ledger(), &stored(GOOD.0, GOOD.1));
        let bad = compare("region2", &ledger(), &stored(GOOD.0, &[]));
        assert_eq!(Report::new(&ledger(), vec![good.clone(), good.clone()]).verdict(), "exact");
        let report = Report::new(&ledger(), vec![good, bad]);
        assert_eq!(report.verdict(), "region2: lost 1");
        assert!(!report.holds());
        assert!(report.to_string().contains("b: acknowledged 1"), "{report}");
        assert!(!Report::new(&ledger(), Vec::new()).holds());
    }
}
