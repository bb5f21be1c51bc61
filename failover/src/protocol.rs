//! What orchestrator and agents say to each other: JSON over HTTP.
//!
//! The orchestrator sends an [`Order`] with its epoch to `POST /v1/orders`; an agent refuses an epoch below the
//! highest it has accepted. It reads [`NodeStatus`] from `GET /v1/status`, a long poll that returns at once when
//! something has changed. An order is idempotent: it names the state to reach, and it is carried to its end even
//! if the asker goes away.

use std::collections::BTreeSet;
use std::time::Duration;

use failover_api::{Lsn, Node};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a standby streams from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    pub host: String,
    pub port: u16,
}

/// How a postmaster is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// Rolls back, writes a checkpoint, waits until attached standbys have everything.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// How a standby comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Rejoin {
    /// Its data as it is, or only its upstream has changed.
    Follow,
    /// `pg_rewind` first: it has WAL that the primary has not.
    Rewind,
    /// A new base backup; what it has is thrown away.
    Clone,
}

/// Why an agent does not carry an order out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The agent has obeyed a higher epoch.
    OldEpoch,
    /// The agent obeys another orchestrator.
    OtherOrchestrator,
    /// A newer order came.
    Superseded,
    /// The agent ends.
    Ending,
    Timeout,
    /// A tool rewrites the data, or another order has its turn.
    Busy,
    /// A postmaster that the agent has not started runs on the data.
    Foreign,
    /// The data is not what it was when the agent last looked: somebody has had it in use.
    Changed,
    NoData,
    /// A tool was interrupted while it rewrote the data.
    HalfBuilt,
    /// Postgres ended.
    Ended,
    /// It is writable, and the order is for a standby.
    Leads,
    /// Its data was a primary's.
    Estranged,
    /// Somebody has used its data beside the agent, and nobody has given it up.
    Touched,
    /// The upstream is a standby itself.
    NoUpstream,
    NotPrimary,
    /// Commits do not wait for the standby.
    NotWaitedFor,
    /// The standby is not attached as synchronous.
    NotSync,
    NotStreaming,
    /// Postgres runs and does not take the configuration that was written for it.
    Unread,
    /// The upstream no longer has WAL that is needed.
    WalGone,
    /// It has more of the same history than the upstream, which has lost some: its disk, or an old backup.
    Ahead,
    /// Its history is not the upstream's.
    Diverged,
    /// Postgres cannot read its own data.
    Damaged,
    /// `pg_rewind` cannot help.
    Unrewindable,
    /// The disk is full, or too small for a copy.
    Space,
    /// A login is refused, or a right is missing.
    Access,
    /// No connection or WAL sender is free.
    Connections,
    Failed,
    /// Of another version.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// The way of rejoining that cures what made `how` fail; none for what no rewriting of the data cures.
    #[must_use]
    pub fn cure(self, how: Rejoin) -> Option<Rejoin> {
        match self {
            Self::Diverged if how == Rejoin::Follow => Some(Rejoin::Rewind),
            Self::Estranged => Some(Rejoin::Rewind),
            Self::WalGone
            | Self::Diverged
            | Self::NoData
            | Self::HalfBuilt
            | Self::Damaged
            | Self::Unrewindable => Some(Rejoin::Clone),
            _ => None,
        }
    }
}

/// What an agent is told to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case", deny_unknown_fields)]
pub enum Order {
    /// Run as primary: start when stopped, promote when in recovery. `wait_for` are the standbys each commit waits
    /// for, in force before the first commit; `slots` are the standbys that will stream.
    /// Timelines up to `above` are another node's: a promotion leads to a higher one, and one that leads on such a timeline
    /// is stopped and promoted again, since writers go by the timeline.
    #[serde(rename = "lead")]
    Promote {
        wait_for: BTreeSet<Node>,
        slots: BTreeSet<Node>,
        #[serde(default)]
        above: u32,
    },
    /// Run as a standby of `upstream`. Should it ever lead, its commits wait until it is told for whom.
    /// Unused `slots` on it, which are those of the cluster's nodes, are dropped: they would keep WAL for nobody.
    /// An order that comes late must not meet data that has changed since it was decided: what led on timeline `leads` or above,
    /// which is the least that `upstream` leads on, does not follow it; and what somebody has used beside the agent is rewritten
    /// only when a person has given it up (`discarded`).
    #[serde(rename = "stand")]
    Follow {
        upstream: Upstream,
        how: Rejoin,
        #[serde(default)]
        slots: BTreeSet<Node>,
        #[serde(default)]
        leads: u32,
        #[serde(default)]
        discarded: bool,
    },
    /// Start a stopped node as a standby of nobody, so that what it has can be seen. Data that was a primary's is never
    /// made to follow anybody afterwards without a rewind or a clone.
    #[serde(rename = "wake")]
    StartDetached,
    /// Stop receiving WAL, and do not start again by itself. Answers with the last position received.
    Detach,
    /// Stop the postmaster and everything below it.
    Halt { how: Stop },
    /// Change the standbys each commit waits for, on a running primary.
    WaitFor { nodes: BTreeSet<Node> },
    /// Write a checkpoint.
    Checkpoint,
    /// Answer when every commit acknowledged so far, and every later one, is on `standby`.
    ConfirmSync { standby: Node },
    /// Commit a row that carries the epoch, and answer when it is acknowledged.
    Mark { epoch: u64 },
}

impl Order {
    /// It starts, stops or configures Postgres: a newer one overtakes an older one.
    #[must_use]
    pub fn changes_role(&self) -> bool {
        !matches!(self, Self::Checkpoint | Self::ConfirmSync { .. } | Self::Mark { .. })
    }

    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Promote { .. } => "lead",
            Self::Follow { .. } => "stand",
            Self::StartDetached => "wake",
            Self::Detach => "detach",
            Self::Halt { .. } => "halt",
            Self::WaitFor { .. } => "wait_for",
            Self::Checkpoint => "checkpoint",
            Self::ConfirmSync { .. } => "confirm_sync",
            Self::Mark { .. } => "mark",
        }
    }
}

/// Body of `POST /v1/orders`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Id of the orchestrator that gives it. An agent obeys the first that it hears, and no other
    #[serde(default)]
    pub orchestrator: String,
    /// unless a person has said that the one that it obeys is displaced: the ids of these.
    #[serde(default)]
    pub displaces: BTreeSet<String>,
    pub epoch: u64,
    /// The agent gives up after this many milliseconds and says so.
    pub limit_ms: u64,
    pub what: Order,
}

/// State of the postmaster, known by its parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Postmaster {
    /// Not running. `exit` says how it ended; none when this agent has not run it, or is not told yet.
    /// `settled`: its last child is gone too and the control file was read.
    Stopped {
        exit: Option<String>,
        clean: bool,
        settled: bool,
    },
    Starting,
    Running,
    Stopping,
    /// `pg_rewind` or `pg_basebackup` is at work.
    Rebuilding {
        how: Rejoin,
    },
}

/// What a running Postgres says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    pub in_recovery: bool,
    pub timeline: u32,
    /// Primary: flushed. Standby: received and flushed.
    pub lsn: Lsn,
    /// Standby only.
    pub replayed: Option<Lsn>,
    pub replay_paused: bool,
    /// The standby's WAL receiver; none when it has none.
    pub receiver: Option<Receiver>,
    /// The standbys each commit waits for, as in force.
    pub wait_for: BTreeSet<Node>,
    /// Who streams from this node.
    pub standbys: Vec<Attached>,
    /// Age of this sample when the status was sent.
    pub age_ms: u64,
    /// Seconds since the last replayed commit, for a standby that lags.
    pub lag_seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Receiver {
    pub streaming: bool,
    pub host: String,
    pub port: u16,
    /// Time since the upstream was last heard.
    pub silent_ms: u64,
}

/// A standby as its primary sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attached {
    pub node: Node,
    pub streaming: bool,
    /// Commits wait for it.
    pub sync: bool,
    /// The slot that it streams through. Ours bear the name of their node; whoever streams under a node's name without its
    /// slot is not that node.
    #[serde(default)]
    pub slot: Option<String>,
    pub flushed: Lsn,
    pub replayed: Lsn,
}

/// What the control file of a stopped node says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Control {
    pub timeline: u32,
    /// Location of the latest checkpoint.
    pub checkpoint: Lsn,
    /// `shut down`, `in production`, `shut down in recovery`, ...
    pub state: String,
    pub standby: bool,
}

/// Everything an agent knows of its node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    pub node: Node,
    /// Changes with each start of the agent.
    pub boot: u64,
    /// Grows with each change.
    pub seq: u64,
    /// Highest epoch of an order accepted.
    pub epoch: u64,
    pub system_id: String,
    pub postmaster: Postmaster,
    /// What it is configured to stream from; none when it was detached or leads.
    pub upstream: Option<Upstream>,
    pub sample: Option<Sample>,
    pub control: Option<Control>,
    /// Number of the last marker row acknowledged by this node as primary (one is written several times a second).
    pub marker: u64,
    /// Grows with each commit of the agent's own that was acknowledged, also while somebody holds a lock on the marker.
    #[serde(default)]
    pub beat: u64,
    /// The next of these is under way.
    #[serde(default)]
    pub pending: bool,
    /// No table and no WAL of its can grow: its disk is full.
    #[serde(default)]
    pub full: bool,
    /// There is nothing at all in its data directory.
    #[serde(default)]
    pub empty: bool,
    /// Whoever this primary counted as synchronous has at least this much: the last marker was acknowledged.
    #[serde(default)]
    pub acknowledged: Lsn,
    /// Id of the orchestrator that it obeys; empty before the first order.
    #[serde(default)]
    pub orchestrator: String,
    /// A postmaster that the agent has not started runs on its data.
    #[serde(default)]
    pub foreign: Option<i32>,
    /// Such a one has run on it, or somebody made its commits wait for fewer than was ordered, since it was last rewritten or
    /// a standby was confirmed: what it wrote, nobody else may have.
    #[serde(default)]
    pub touched: bool,
    /// It was ordered to lead with commits that wait for nobody, and no standby has been confirmed since: what it acknowledged,
    /// nobody else may have.
    #[serde(default)]
    pub alone: bool,
    /// Why its Postgres cannot be asked, while it cannot.
    #[serde(default)]
    pub trouble: Option<String>,
    /// It is writable, was seen as a standby before, and its commits have waited for nobody's name ever since: it has
    /// acknowledged nothing.
    #[serde(default)]
    pub guarded: bool,
    /// Its data was a primary's and was started as a standby as it was: it may have commits that no other node has.
    #[serde(default)]
    pub estranged: bool,
}

impl Attached {
    /// It is the node whose name it bears, and streams.
    #[must_use]
    pub fn is_genuine(&self) -> bool {
        self.streaming && self.slot.as_deref() == Some(&self.node)
    }
}

impl NodeStatus {
    /// Of a node that has not been looked at.
    #[must_use]
    pub fn unseen(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            boot: 1,
            seq: 1,
            epoch: 0,
            system_id: String::new(),
            postmaster: Postmaster::Stopped { exit: None, clean: false, settled: false },
            upstream: None,
            sample: None,
            control: None,
            marker: 0,
            beat: 0,
            pending: false,
            empty: false,
            acknowledged: Lsn::default(),
            orchestrator: String::new(),
            foreign: None,
            touched: false,
            alone: false,
            full: false,
            trouble: None,
            guarded: false,
            estranged: false,
        }
    }

    /// The highest timeline that is known of it; 0 when none is.
    #[must_use]
    pub fn timeline(&self) -> u32 {
        let sampled = self.sample.as_ref().map_or(0, |sample| sample.timeline);
        sampled.max(self.control.as_ref().map_or(0, |control| control.timeline))
    }

    #[must_use]
    pub fn is_running(&self) -> bool {
        self.postmaster == Postmaster::Running
    }

    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self.postmaster, Postmaster::Stopped { .. })
    }

    /// Running and not in recovery.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.is_running() && self.sample.as_ref().is_some_and(|sample| !sample.in_recovery)
    }

    #[must_use]
    pub fn is_standby(&self) -> bool {
        self.is_running() && self.sample.as_ref().is_some_and(|sample| sample.in_recovery)
    }
}

/// Milliseconds, for JSON.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
