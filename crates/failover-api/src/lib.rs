//! What the failover orchestrator answers, for whoever asks it: shapes only, no deciding.

mod lsn;
mod plan;
mod problem;
mod report;
mod status;

use serde::Serialize;

pub use lsn::{Lsn, NotAnLsn};
pub use plan::{AdoptPlan, Check, Facts, Plan};
pub use problem::{Problem, ProblemBody};
pub use report::{HistoryReport, Kind, Report, StepError, StepRecord, StepStatus, Verification};
pub use status::{Copies, Mode, NodeReport, RedisReport, Role, Status, SyncState};

/// Name of a node, which is the name of its region, its replication slot and its `application_name`.
pub type Node = String;

/// The word that stands for a value of one word in JSON, for texts and metrics.
#[must_use]
pub fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        other => format!("{other:?}"),
    }
}
