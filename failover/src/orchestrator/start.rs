//! The first start: who is primary, when nothing is written down.

use std::time::Duration;

use failover_api::{Copies, Node};

use crate::decide::Rules;
use crate::protocol::NodeStatus;
use crate::state::State;
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
    not_overtaken(node, status, &heard)?;
    // Whoever they obey knows more than we do.
    if let Some((other, obeying)) = heard.iter().find(|(_, status)| !status.orchestrator.is_empty()) {
        return Err(format!(
            "{other} has obeyed orchestrator {} (epoch {}), and this one has no state: bring back that one's directory, or, when it is \
             lost, POST /adopt/{{region}} (first with dry_run=true)",
            obeying.orchestrator, obeying.epoch
        ));
    }
    let wait_for = match rules.copies {
        Copies::Available => Default::default(),
        Copies::TwoCopies => {
            heard.iter().map(|(other, _)| (*other).clone()).filter(|other| other != *node).collect()
        }
    };
    // Above every epoch an agent has accepted: state that was lost must not leave us powerless.
    let epoch = heard.iter().map(|(_, status)| status.epoch).max().unwrap_or(0) + 1;
    // Its own timeline and none below is the primary's.
    let above = status.timeline().saturating_sub(1);
    Ok(State { epoch, above, ..State::first((*node).clone(), status.system_id.clone(), wait_for) })
}

/// Refuses a primary that another node has overtaken: what that one acknowledged would be thrown away.
fn not_overtaken(node: &Node, status: &NodeStatus, heard: &[(&Node, &NodeStatus)]) -> Result<(), String> {
    let own = status.timeline();
    for (other, found) in heard.iter().filter(|(other, _)| *other != node) {
        let timeline = found.timeline();
        if timeline > own {
            return Err(format!(
                "{node} has data of a primary on timeline {own}, but {other} is on timeline {timeline}: somebody led \
                 after {node}. Name the node that led last in orchestrator.first_primary, or, if the data of {other} is \
                 to be thrown away, stop its agent, move its data directory aside and start the agent again"
            ));
        }
        if found.is_writable() && !status.is_writable() {
            return Err(format!(
                "{other} is writable now and {node} is not: stop {other}, or name it in orchestrator.first_primary"
            ));
        }
        if found.is_writable() {
            return Err(format!(
                "{node} and {other} are both writable: stop the one whose data is to be thrown away, and name the other \
                 one in orchestrator.first_primary"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::tests::rules;
    use crate::protocol::{Control, Postmaster, Sample};
    use crate::view::Seen;

    fn node(name: &str, timeline: u32, running: bool, standby: bool) -> (Node, Seen) {
        let lsn = "0/3000060".parse().unwrap();
        let sample = Sample {
            in_recovery: standby,
            timeline,
            lsn,
            replayed: None,
            replay_paused: false,
            receiver: None,
            wait_for: Default::default(),
            standbys: Vec::new(),
            age_ms: 0,
            lag_seconds: 0.0,
        };
        let control = Control { timeline, checkpoint: lsn, state: "in production".into(), standby };
        let status = NodeStatus {
            epoch: 4,
            system_id: "s".into(),
            postmaster: if running {
                Postmaster::Running
            } else {
                Postmaster::Stopped { exit: None, clean: false, settled: true }
            },
            sample: running.then_some(sample),
            control: (!running).then_some(control),
            ..NodeStatus::unseen(name)
        };
        (name.into(), Seen { status: Some(status), heard: Some(Duration::ZERO), ..Seen::default() })
    }

    fn first(named: &str, a: (u32, bool, bool), b: (u32, bool, bool)) -> Result<String, String> {
        let nodes = [node("a", a.0, a.1, a.2), node("b", b.0, b.1, b.2)].into();
        first_state(&View { nodes, ..View::default() }, &rules(), named, Duration::ZERO).map(|state| {
            assert_eq!(state.epoch, 5, "above what the agents have accepted");
            state.primary
        })
    }

    #[test]
    fn the_first_primary_is_never_one_that_another_has_overtaken() {
        const DOWN: bool = false;
        const UP: bool = true;
        const LEADER: bool = false;
        const STANDBY: bool = true;
        for (named, a, b, expected) in [
            ("", (1, DOWN, LEADER), (1, DOWN, STANDBY), Ok("a")),
            ("b", (1, UP, LEADER), (1, UP, STANDBY), Ok("a")),
            ("", (1, DOWN, LEADER), (1, DOWN, LEADER), Err("first_primary")),
            ("b", (1, DOWN, LEADER), (1, DOWN, LEADER), Ok("b")),
            ("b", (1, DOWN, LEADER), (2, DOWN, LEADER), Ok("b")),
            ("a", (1, DOWN, LEADER), (2, DOWN, LEADER), Err("timeline 2")),
            // A standby that has seen a later timeline: its primary is not among these data.
            ("", (1, DOWN, LEADER), (2, DOWN, STANDBY), Err("timeline 2")),
            ("a", (1, DOWN, LEADER), (1, UP, LEADER), Err("writable now")),
            ("b", (1, DOWN, LEADER), (1, UP, LEADER), Ok("b")),
            ("a", (1, UP, LEADER), (1, UP, LEADER), Err("both writable")),
            ("", (1, DOWN, STANDBY), (1, DOWN, STANDBY), Err("by hand")),
        ] {
            match (first(named, a, b), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{named:?} {a:?} {b:?}"),
                (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
                (found, expected) => panic!("{named:?} {a:?} {b:?}: {found:?}, expected {expected:?}"),
            }
        }
    }
}
