//! What would be done: the answers with `?dry_run=true`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Node;
use crate::lsn::Lsn;
use crate::problem::ProblemBody;
use crate::report::Kind;
use crate::status::Role;

/// What would happen.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    pub dry_run: bool,
    /// Whether it would be carried out.
    pub possible: bool,
    pub kind: Option<Kind>,
    pub source_region: String,
    pub target_region: String,
    pub plan: Vec<String>,
    pub checks: Vec<Check>,
    /// Of WAL that the target may lack. Null: not known.
    pub bytes_at_risk: Option<u64>,
    /// Median of earlier ones of this kind, else what was measured in the lab.
    pub estimated_ms: f64,
    /// Copies of each commit right afterwards.
    pub copies_after: usize,
    pub refusal: Option<ProblemBody>,
}

/// One check and how it came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    pub detail: String,
}

/// What would be taken for the truth.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct AdoptPlan {
    pub dry_run: bool,
    /// Whether it would be carried out.
    pub possible: bool,
    pub region: String,
    pub checks: Vec<Check>,
    pub nodes: Vec<Facts>,
    pub refusal: Option<ProblemBody>,
}

/// What is known of one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Facts {
    pub region: Node,
    pub role: Role,
    /// Its agent answers.
    pub heard: bool,
    pub timeline: u32,
    pub lsn: Lsn,
    /// The highest that its agent has obeyed, and of whom.
    pub epoch: u64,
    pub orchestrator: String,
    /// Why its data would be kept from being rewritten; null when it would simply follow.
    pub kept: Option<String>,
}
