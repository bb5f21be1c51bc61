//! What a scenario showed, for people and as JSON.

use std::fmt;

use serde_json::{Value, json};

use super::OutageArgs;
use super::watch::{CatchUp, Worst};

/// The consumer's memory beside three times `ingest.queue_bytes` (payloads, the pieces of the socket that hold them,
/// what the allocator keeps): two writers' COPY buffers of 4 MiB that may double, and the program itself.
const BUFFERS: u64 = 48 << 20;
/// The chunk read last may go over the queue's bound: one read of 256 KiB, or one packet of at most 17 MiB.
const CHUNK_BYTES: u64 = 17 << 20;
/// The same in messages: a read of 256 KiB holds fewer than this of 60 bytes or more.
const CHUNK_MESSAGES: u64 = 4_500;

/// One scenario.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub(super) name: String,
    pub(super) outage_seconds: f64,
    pub(super) live_rate: f64,
    pub(super) acknowledged: u64,
    pub(super) verdict: String,
    pub(super) exact: bool,
    pub(super) must_keep_broker: bool,
    pub(super) worst: Worst,
    pub(super) catch_up: Option<CatchUp>,
    pub(super) retries: u64,
    pub(super) duplicates: u64,
}

impl Outcome {
    /// Whether everything that was promised held.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.broken().is_empty()
    }

    /// What did not hold, one sentence each.
    #[must_use]
    pub fn broken(&self) -> Vec<String> {
        let worst = &self.worst;
        let mut broken = Vec::new();
        if !self.exact {
            broken.push(format!("the ledger does not match the tables: {}", self.verdict));
        }
        if worst.rss_bytes > self.rss_bound() {
            broken.push(format!(
                "the consumer took {} MiB, more than {} MiB",
                mib(worst.rss_bytes),
                mib(self.rss_bound())
            ));
        }
        if worst.queue_messages > worst.queue_messages_bound + CHUNK_MESSAGES {
            broken.push(format!(
                "the queue held {} messages, bound {}",
                worst.queue_messages, worst.queue_messages_bound
            ));
        }
        if worst.queue_bytes > worst.queue_bytes_bound + CHUNK_BYTES {
            broken.push(format!(
                "the queue held {} bytes, bound {}",
                worst.queue_bytes, worst.queue_bytes_bound
            ));
        }
        if self.must_keep_broker && !self.kept_broker() {
            broken.push(format!(
                "the broker was lost although it was never away: {} reconnects, {} looks without it",
                worst.reconnects, worst.unconnected
            ));
        }
        if self.catch_up.is_none() {
            broken.push("it never caught up".to_owned());
        }
        broken
    }

    /// What the consumer's memory must not exceed.
    #[must_use]
    pub fn rss_bound(&self) -> u64 {
        3 * self.worst.queue_bytes_bound + BUFFERS
    }

    fn kept_broker(&self) -> bool {
        self.worst.reconnects == 0 && self.worst.unconnected == 0
    }

    /// Rows per second while the backlog shrank, as a multiple of the live rate.
    fn factor(&self) -> Option<f64> {
        Some(self.catch_up.as_ref()?.per_second? / self.live_rate)
    }

    fn json(&self) -> Value {
        let worst = &self.worst;
        json!({
            "name": self.name,
            "holds": self.holds(),
            "broken": self.broken(),
            "verdict": self.verdict,
            "acknowledged": self.acknowledged,
            "outage_seconds": self.outage_seconds,
            "live_rate": self.live_rate,
            "backlog": worst.backlog,
            "catch_up_rate": self.catch_up.as_ref().and_then(|catch_up| catch_up.per_second),
            "catch_up_factor": self.factor(),
            "caught_up_after_seconds": self.catch_up.as_ref().map(|catch_up| catch_up.after_seconds),
            "catch_up_cores": self.catch_up.as_ref().map(|catch_up| &catch_up.cores),
            "consumer_rss_max_bytes": worst.rss_bytes,
            "consumer_rss_bound_bytes": self.rss_bound(),
            "broker_rss_max_bytes": worst.broker_rss_bytes,
            "queue_messages_max": worst.queue_messages,
            "queue_messages_bound": worst.queue_messages_bound,
            "queue_bytes_max": worst.queue_bytes,
            "queue_bytes_bound": worst.queue_bytes_bound,
            "oldest_unacknowledged_max_seconds": worst.oldest_unacknowledged_seconds,
            "broker_must_be_kept": self.must_keep_broker,
            "broker_kept": self.kept_broker(),
            "reconnects": worst.reconnects,
            "retries": self.retries,
            "duplicates": self.duplicates,
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worst = &self.worst;
        write!(
            f,
            "{:<21} {:>6.0}/s live, backlog {}, consumer {} of {} MiB, broker {} MiB",
            self.name,
            self.live_rate,
            worst.backlog,
            mib(worst.rss_bytes),
            mib(self.rss_bound()),
            mib(worst.broker_rss_bytes),
        )?;
        if let Some(catch_up) = &self.catch_up {
            write!(f, ", caught up after {:.1} s", catch_up.after_seconds)?;
            let cores: Vec<String> =
                catch_up.cores.iter().map(|(name, cores)| format!("{name} {cores:.2}")).collect();
            write!(f, " (cores: {})", cores.join(", "))?;
        }
        write!(f, ": {}", self.verdict)?;
        self.broken().iter().try_for_each(|what| write!(f, "\n    BROKEN: {what}"))
    }
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

pub(super) fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "\n{:<21} {:>7} {:>9} {:>8} {:>14} {:>8} {:>9} {:>9} {:>7} {:>8}  {}",
        "scenario",
        "live/s",
        "backlog",
        "RSS MiB",
        "queue msg/MiB",
        "oldest s",
        "broker",
        "catch-up",
        "x live",
        "after s",
        "verdict"
    );
    for outcome in outcomes {
        let worst = &outcome.worst;
        let catch_up = outcome.catch_up.as_ref();
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        text.push_str(&format!(
            "\n{:<21} {:>7.0} {:>9} {:>8} {:>14} {:>8.1} {:>9} {:>9} {:>7} {:>8}  {}",
            outcome.name,
            outcome.live_rate,
            worst.backlog,
            mib(worst.rss_bytes),
            format!("{}/{}", worst.queue_messages, mib(worst.queue_bytes)),
            worst.oldest_unacknowledged_seconds,
            match (outcome.kept_broker(), outcome.must_keep_broker) {
                (true, _) => "kept",
                (false, true) => "LOST",
                (false, false) => "came back",
            },
            or_dash(catch_up.and_then(|it| it.per_second).map(|rate| format!("{rate:.0}/s"))),
            or_dash(outcome.factor().map(|factor| format!("{factor:.2}"))),
            or_dash(catch_up.map(|it| format!("{:.1}", it.after_seconds))),
            if outcome.holds() { outcome.verdict.as_str() } else { "BROKEN, see above" },
        ));
    }
    if let Some(outcome) = outcomes.first() {
        text.push_str(&format!(
            "\nbounds: RSS {} MiB, queue {} messages or {} MiB",
            mib(outcome.rss_bound()),
            outcome.worst.queue_messages_bound,
            mib(outcome.worst.queue_bytes_bound)
        ));
    }
    text
}

pub(super) fn document(args: &OutageArgs, outcomes: &[Outcome]) -> Value {
    json!({
        "rate": args.rate,
        "outage_seconds": args.outage.as_secs_f64(),
        "settings": args.set,
        "outcomes": outcomes.iter().map(Outcome::json).collect::<Vec<_>>(),
    })
}
