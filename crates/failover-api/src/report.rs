//! One change of the primary: the answer of `POST /failover/{region}`, an entry of `GET /history`.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Node;
use crate::lsn::Lsn;

/// Answer of `POST /failover/{region}` and an entry of `GET /history`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Report {
    pub id: String,
    pub number: u64,
    pub kind: Kind,
    pub success: bool,
    #[schema(value_type = String)]
    pub start_time: Timestamp,
    #[schema(value_type = String)]
    pub end_time: Timestamp,
    pub source_region: Node,
    pub target_region: Node,
    pub actor: String,
    pub reason: String,
    pub steps: Vec<StepRecord>,
    pub total_duration_ms: f64,
    /// Below 5 s, and done.
    pub tier0_compliant: bool,
    /// From the moment the source was known to be down, or was asked to stop, to the first commit on the target.
    pub write_gap_ms: Option<f64>,
    pub error: Option<StepError>,
    pub epoch: u64,
    pub timeline_before: u32,
    pub timeline_after: u32,
    pub source_lsn: Option<Lsn>,
    pub target_lsn: Option<Lsn>,
    /// Of WAL that the target may have lacked. Null: not known.
    pub bytes_at_risk: Option<u64>,
    /// How many copies the target's commits have at first.
    pub copies_after: usize,
    pub hash: String,
    pub previous_hash: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The source lives and takes part.
    Planned,
    /// The source is gone; the target holds every acknowledged commit.
    Unplanned,
    /// The operator accepts the loss of what the target does not have.
    Forced,
    /// A person has taken the world as it is for the truth.
    Adopted,
    /// A person has given up what only one node may have.
    Discarded,
}

/// How one step went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StepRecord {
    pub number: u32,
    pub action: String,
    /// Entries of earlier versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub started_at: Option<Timestamp>,
    pub duration_ms: f64,
    pub status: StepStatus,
    pub detail: String,
}

impl StepRecord {
    /// A step that ended at `ended` after `took`.
    #[must_use]
    pub fn new(
        number: u32,
        action: &str,
        ended: Timestamp,
        took: Duration,
        status: StepStatus,
        detail: String,
    ) -> Self {
        Self {
            number,
            action: action.into(),
            started_at: ended.checked_sub(took).ok(),
            duration_ms: took.as_secs_f64() * 1000.0,
            status,
            detail,
        }
    }
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepStatus {
    Done,
    Failed,
    RolledBack,
}

/// The step that failed and what was undone.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct StepError {
    pub code: String,
    pub step: String,
    pub message: String,
    pub rolled_back: String,
}

/// `GET /history`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HistoryReport {
    /// Newest first.
    pub failovers: Vec<Report>,
    /// With `?verify=true`.
    pub verification: Option<Verification>,
}

/// How a verification went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    pub entries: u64,
    pub intact: bool,
    /// The first line that does not fit, from 1, and why.
    pub broken: Option<String>,
}
