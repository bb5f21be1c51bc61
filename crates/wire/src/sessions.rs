//! The ledger of user activity: what a publisher knows the broker confirmed, session by session.
//!
//! A simulator writes it, `tier0 verify` compares it with `user_sessions`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The newest state of a session. Times in microseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    pub user_id: String,
    /// `active`, `idle` or `disconnected`.
    pub connection_status: String,
    pub region: Option<String>,
    pub username: Option<String>,
    pub ip_address: Option<String>,
    pub login_us: Option<i64>,
    /// As the table shows it: only while the session is disconnected.
    pub logout_us: Option<i64>,
    pub last_activity_us: i64,
}

/// What one run did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionLedger {
    pub seed: u64,
    /// True when the run came to its end. False: a snapshot; sessions may be newer in the table than here.
    pub complete: bool,
    pub started_us: i64,
    pub ended_us: i64,
    /// Messages that the broker confirmed, of every kind.
    pub confirmed: u64,
    /// Confirmed messages that had been published before.
    pub repeated: u64,
    /// The newest confirmed state of each session.
    pub sessions: BTreeMap<String, SessionState>,
    /// Confirmed site reports.
    pub site_reports: u64,
    /// Confirmed messages that must end as a dead letter, by reason. A repeated one is one more.
    pub dead_letters: BTreeMap<String, u64>,
    /// Sessions of messages that were sent and never confirmed: they may be in the table or not.
    pub unknown: Vec<String>,
}
