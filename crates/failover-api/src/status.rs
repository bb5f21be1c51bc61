//! `GET /status`.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Node;
use crate::lsn::Lsn;
use crate::report::Report;

/// `GET /status`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Status {
    pub current_region: Node,
    /// `alive`, `gone`, `lost`, `standby` or why it is uncertain.
    pub primary_condition: String,
    pub epoch: u64,
    /// Id of this orchestrator: agents obey no other.
    pub orchestrator: String,
    /// Why what is written down may be older than the facts. While there is a reason, nothing is done.
    pub doubts: Vec<String>,
    /// The node that writers take for the primary; null when none is writable.
    pub writers_see: Option<Node>,
    pub mode: Mode,
    pub copies: Copies,
    /// Standbys that have every acknowledged commit.
    pub sync_set: BTreeSet<Node>,
    /// Standbys for which each commit waits.
    pub wait_for: BTreeSet<Node>,
    pub nodes: Vec<NodeReport>,
    pub redis: RedisReport,
    pub deployment_version: String,
    pub failover_count: u64,
    pub failover_under_way: bool,
    pub last_failover: Option<Report>,
    /// What a person must know. Empty when all is well.
    pub alarms: Vec<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct RedisReport {
    pub configured: bool,
    /// `host:port` as most Sentinels say.
    pub master: Option<String>,
    pub region: Option<Node>,
    /// The instance in the region of the primary is master, by its own word and by most Sentinels'.
    #[serde(default)]
    pub follows: bool,
    #[serde(default)]
    pub sentinels: usize,
    #[serde(default)]
    pub sentinels_agree: usize,
    /// What each instance says it is, by region: `master`, `replica`, or why it is not known.
    #[serde(default)]
    pub instances: BTreeMap<Node, String>,
    /// Why no master is known.
    pub error: Option<String>,
    /// Are among those of the status.
    #[serde(skip)]
    pub alarms: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeReport {
    pub region: Node,
    pub address: String,
    pub role: Role,
    pub timeline: Option<u32>,
    pub lsn: Option<Lsn>,
    pub lag_bytes: Option<u64>,
    pub lag_seconds: Option<f64>,
    pub sync_state: SyncState,
    /// Streams from the primary, by its own words. False for the primary; a switchover needs it of its target.
    pub streaming: bool,
    /// WAL that is received and not replayed: a promotion waits for it.
    pub replay_bytes: Option<u64>,
    /// Why its data is not rewritten until POST /discard.
    pub kept: Option<String>,
    /// What its last orders failed with, or why its agent cannot ask it.
    pub trouble: Option<String>,
    /// The highest epoch that its agent has obeyed.
    pub epoch: Option<u64>,
    pub agent_last_seen_ms: Option<u64>,
    pub postgres_last_seen_ms: Option<u64>,
}

/// What a node is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Primary,
    Standby,
    Stopped,
    Starting,
    Stopping,
    Rebuilding,
    /// Somebody has started Postgres beside its agent.
    Foreign,
    Unknown,
}

impl Role {
    pub const ALL: [Self; 8] = [
        Self::Primary,
        Self::Standby,
        Self::Stopped,
        Self::Starting,
        Self::Stopping,
        Self::Rebuilding,
        Self::Foreign,
        Self::Unknown,
    ];
}

/// What a standby holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SyncState {
    /// Every acknowledged commit.
    Sync,
    /// Waited for, not confirmed yet.
    CatchingUp,
    /// It streams.
    Async,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Fails over, degrades and rejoins by itself.
    Auto,
    /// Starts, stops, promotes and rewrites no node by itself, but for a second writable one, which is stopped. Whom
    /// commits wait for is still kept true: a standby that dies is given up. An operation under way is finished.
    Paused,
}

/// How many copies a commit needs right after a failover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Copies {
    /// Acknowledge at once with one copy when no standby is left; an alarm until there are two.
    Available,
    /// Acknowledge only when a standby has it too; until then the brokers hold the readings.
    TwoCopies,
}
