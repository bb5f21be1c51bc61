//! What came of a run, for the eye and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use wire::ledger::Ledger;
use wire::sessions::SessionLedger;

use super::sample::Sampler;
use crate::up::args::UpArgs;
use crate::verify::Report;
use crate::verify::stored::Stored;

/// The keys of `--summary FILE`. Times in the units their names say; latencies from the device's timestamp to the commit
/// on both nodes.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Summary {
    /// `exact`, or what is wrong.
    pub verdict: String,
    /// Whether the run kept its promise: the exit status.
    pub holds: bool,
    /// Time of publishing, up to the last acknowledgement.
    pub seconds: f64,
    /// From the end of publishing until the last reading was committed.
    pub drain_seconds: f64,
    /// From the start of the command to the first committed row.
    pub start_seconds: Option<f64>,
    /// Messages the broker acknowledged.
    pub acknowledged: u64,
    /// Distinct good readings among them.
    pub readings: u64,
    pub devices: u64,
    pub stored_primary: u64,
    pub stored_standby: Option<u64>,
    /// Distinct identities on the primary, counted.
    pub distinct: u64,
    pub dead_letters: u64,
    pub dead_letters_by_reason: BTreeMap<String, u64>,
    /// Readings that arrived again and were stored already.
    pub duplicates: u64,
    /// Of the simulator: messages the broker did not accept, by its reason; never made, being due too long ago; sent again
    /// because a connection was lost; acknowledged with something wrong on purpose, by what it was.
    pub refused: BTreeMap<String, u64>,
    pub skipped: u64,
    pub resent: u64,
    pub trouble: BTreeMap<String, u64>,
    /// Readings stored per second of publishing.
    pub rate_per_s: f64,
    pub p50_ms: Option<f64>,
    pub p95_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub consumer_rss_mb_max: f64,
    /// Messages of user activity the broker confirmed, and the sessions they are of.
    pub session_messages: u64,
    pub sessions: u64,
    /// Processor time by process, everything below it included.
    pub cpu_seconds: BTreeMap<String, f64>,
    pub report: Option<Report>,
}

impl Summary {
    pub(super) fn new(
        args: &UpArgs,
        ledger: Option<&Ledger>,
        (report, sessions): (Option<Report>, Option<&SessionLedger>),
        nodes: &[(String, Stored)],
        sampler: &Sampler,
        (published, stored_after): (Duration, Duration),
        trouble: Vec<String>,
    ) -> Self {
        let rows = |index: usize| nodes.get(index).map(|(_, stored)| stored.rows);
        let latencies = sampler.latencies();
        let milliseconds = |q: f64| latencies.quantile(q).map(|seconds| seconds * 1000.0);
        let dead_letters = nodes.first().map(|(_, stored)| stored.dead_letters.clone()).unwrap_or_default();
        let seconds = match ledger {
            // The publisher's own clock, when it could not stop the run's timer itself.
            Some(ledger) if ledger.ended_us > ledger.started_us => {
                Duration::from_micros(u64::try_from(ledger.ended_us - ledger.started_us).unwrap_or(1))
                    .as_secs_f64()
            }
            _ => published.as_secs_f64(),
        };
        let stored = rows(0).unwrap_or(0);
        let of_this_run =
            ledger.map_or(sampler.since_start(sampler.newest(), "ingest_rows_committed_total"), |_| stored);
        let (mut verdict, mut holds) = match &report {
            Some(report) => (report.verdict(), report.holds()),
            None => agreement(nodes),
        };
        if ledger.is_some_and(|ledger| ledger.acknowledged == 0) {
            holds = false;
            verdict = "nothing was acknowledged, so nothing is shown".into();
        }
        if !trouble.is_empty() {
            holds = false;
            verdict = format!("{verdict}; {}", trouble.join("; "));
        }
        if args.without.contains(&crate::up::args::Part::MqttConsumer) && report.is_some() {
            verdict = format!("{verdict} (without mqtt-consumer)");
        }
        #[allow(clippy::cast_precision_loss, reason = "figures for the eye")]
        let (rate_per_s, consumer_rss_mb_max) =
            (of_this_run as f64 / seconds.max(0.001), sampler.consumer_rss_max() as f64 / 1e6);
        Self {
            verdict,
            holds,
            seconds,
            drain_seconds: stored_after.saturating_sub(published).as_secs_f64(),
            start_seconds: sampler.start_seconds(),
            acknowledged: ledger.map_or(0, |ledger| ledger.acknowledged),
            readings: ledger.map_or(0, Ledger::readings),
            devices: u64::try_from(ledger.map_or(0, |ledger| ledger.devices.len())).unwrap_or(u64::MAX),
            stored_primary: stored,
            stored_standby: rows(1),
            distinct: nodes.first().map_or(0, |(_, stored)| stored.distinct),
            dead_letters: dead_letters.values().sum(),
            dead_letters_by_reason: dead_letters,
            duplicates: sampler.since_start(sampler.newest(), "ingest_duplicates_total"),
            refused: ledger.map(|ledger| ledger.refused.clone()).unwrap_or_default(),
            skipped: ledger.map_or(0, |ledger| ledger.skipped),
            resent: ledger.map_or(0, |ledger| ledger.resent),
            trouble: ledger.map(|ledger| ledger.trouble.clone()).unwrap_or_default(),
            rate_per_s,
            p50_ms: milliseconds(0.5),
            p95_ms: milliseconds(0.95),
            p99_ms: milliseconds(0.99),
            consumer_rss_mb_max,
            session_messages: sessions.map_or(0, |ledger| ledger.confirmed),
            sessions: sessions.map_or(0, |ledger| ledger.sessions.len() as u64),
            cpu_seconds: sampler.cpu_seconds().clone(),
            report,
        }
    }
}

/// Without a ledger nobody knows what should be there; the nodes must at least agree.
fn agreement(nodes: &[(String, Stored)]) -> (String, bool) {
    match nodes.split_first() {
        Some(((_, first), rest)) if rest.iter().all(|(_, stored)| stored == first) => {
            ("no ledger; the nodes agree".into(), true)
        }
        _ => ("no ledger; the nodes differ".into(), false),
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |milliseconds: Option<f64>| {
            milliseconds.map_or_else(|| "-".into(), |milliseconds| format!("{milliseconds:.0} ms"))
        };
        writeln!(f)?;
        writeln!(
            f,
            "{:<22}{:.1} s of publishing, {:.1} s to drain, {:.0} rows/s",
            "time", self.seconds, self.drain_seconds, self.rate_per_s
        )?;
        writeln!(
            f,
            "{:<22}{} messages, {} distinct readings of {} devices",
            "acknowledged", self.acknowledged, self.readings, self.devices
        )?;
        let refused: u64 = self.refused.values().sum();
        for (count, what) in [
            (self.skipped, "SKIPPED by the simulator: due too long ago"),
            (refused, "REFUSED by the broker"),
            (self.resent, "sent again after a lost connection"),
        ] {
            if count > 0 {
                writeln!(f, "{:<22}  {count} messages {what}", "")?;
            }
        }
        for (reason, count) in self.refused.iter().chain(&self.trouble) {
            writeln!(f, "{:<22}  {reason} {count}", "")?;
        }
        let standby =
            self.stored_standby.map_or_else(|| "no standby".into(), |rows| format!("{rows} on the standby"));
        writeln!(
            f,
            "{:<22}{} on the primary, {standby}, {} distinct",
            "stored", self.stored_primary, self.distinct
        )?;
        writeln!(f, "{:<22}{}, duplicates {}", "dead letters", self.dead_letters, self.duplicates)?;
        for (reason, count) in &self.dead_letters_by_reason {
            writeln!(f, "{:<22}  {reason} {count}", "")?;
        }
        writeln!(
            f,
            "{:<22}p50 {}, p95 {}, p99 {}",
            "device to commit",
            show(self.p50_ms),
            show(self.p95_ms),
            show(self.p99_ms)
        )?;
        writeln!(
            f,
            "{:<22}{} messages confirmed, {} sessions",
            "user activity", self.session_messages, self.sessions
        )?;
        writeln!(f, "{:<22}{:.0} MB at most", "consumer memory", self.consumer_rss_mb_max)?;
        let cpu: Vec<String> =
            self.cpu_seconds.iter().map(|(name, seconds)| format!("{name} {seconds:.1} s")).collect();
        writeln!(f, "{:<22}{}", "processor time", cpu.join(", "))?;
        if let Some(report) = &self.report
            && !report.holds()
        {
            writeln!(f, "{report}")?;
        }
        write!(f, "{:<22}{}", "verdict", self.verdict)
    }
}
