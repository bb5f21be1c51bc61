//! The first start: who is primary, when nothing is written down.

use std::time::Duration;

use crate::decide::Rules;
use crate::protocol::{Node, NodeStatus};
use crate::state::{Copies, State};
use crate::view::View;

/// The first state, or why it cannot be told yet. Never guesses: taking the wrong node would throw data away.
///
/// # Errors
/// What is missing, and what to do.
pub fn first_state(view: &View, rules: &Rules, named: &str, now: Duration) -> Result<State, String> {
    let mut heard: Vec<(&Node, &NodeStatus)> = Vec::new();
    for (node, seen) in &view.nodes {
        let status =
            seen.fresh(now, &rules.policy).ok_or_else(|| format!("the agent of {node} is not heard"))?;
        let settled = matches!(
            status.postmaster,
            crate::protocol::Postmaster::Running | crate::protocol::Postmaster::Stopped { settled: true, .. }
        );
        if !settled || status.is_running() && status.sample.is_none() {
            return Err(format!("{node} is {:?}", status.postmaster));
        }
        heard.push((node, status));
    }
    let leads = |status: &NodeStatus| {
        status.is_writable() || status.control.as_ref().is_some_and(|control| !control.standby)
    };
    let leaders: Vec<_> = heard.iter().filter(|(_, status)| leads(status)).collect();
    let (node, status) = match leaders.as_slice() {
        [one] => one,
        [] => return Err("no node's data is that of a primary; start one by hand".into()),
        several => several.iter().find(|(node, _)| *node == named).ok_or_else(|| {
            let names: Vec<&str> = several.iter().map(|(node, _)| node.as_str()).collect();
            format!(
                "{} all have data of a primary; name the right one in orchestrator.first_primary",
                names.join(", ")
            )
        })?,
    };
    let wait_for = match rules.copies {
        Copies::Available => Default::default(),
        Copies::TwoCopies => {
            heard.iter().map(|(other, _)| (*other).clone()).filter(|other| other != *node).collect()
        }
    };
    // Above every epoch an agent has accepted: state that was lost must not leave us powerless.
    let epoch = heard.iter().map(|(_, status)| status.epoch).max().unwrap_or(0) + 1;
    Ok(State { epoch, ..State::first((*node).clone(), status.system_id.clone(), wait_for) })
}
