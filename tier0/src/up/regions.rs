//! What the screen shows of the regions.

use failover_api::{Status, word};
use jiff::Timestamp;

/// What the orchestrator says.
#[derive(Debug, Clone, Default)]
pub struct RegionsSeen {
    pub primary: String,
    /// `alive`, or why commits may not flow.
    pub condition: String,
    /// Of each acknowledged commit.
    pub copies: usize,
    pub last_failover: Option<String>,
    pub alarms: Vec<String>,
}

impl RegionsSeen {
    pub(super) fn of(status: &Status) -> Self {
        let last = status.last_failover.as_ref().map(|last| {
            let ago = Timestamp::now().duration_since(last.end_time).as_secs().max(0);
            let ago = if ago < 120 { format!("{ago} s") } else { format!("{} min", ago / 60) };
            let outcome = match last.write_gap_ms {
                _ if !last.success => ", failed".to_owned(),
                Some(gap) => format!(", write gap {gap:.0} ms"),
                None => String::new(),
            };
            format!("{} to {} {ago} ago{outcome}", word(&last.kind), last.target_region)
        });
        Self {
            primary: status.current_region.clone(),
            condition: status.primary_condition.clone(),
            copies: status.sync_set.len() + 1,
            last_failover: last,
            alarms: status.alarms.clone(),
        }
    }
}
