//! Actions that are one order or one change of state: everything but a change of the primary.
//!
//! Each is split where a crash could fall: what must be durable before the order, the order, what its success allows.

use std::collections::BTreeSet;
use std::time::Duration;

use failover_api::Node;
use jiff::Timestamp;

use crate::decide::{Action, Rules};
use crate::protocol::{NodeStatus, Order, Rejoin, Stop};
use crate::state::State;

const SWIFT: Duration = Duration::from_secs(5);
/// Crash recovery of a primary, or a checkpoint under load.
const LONG: Duration = Duration::from_secs(120);
/// pg_rewind first lets the node recover by itself: up to `max_wal_size` of WAL.
const REWIND: Duration = Duration::from_secs(600);
/// A base backup of a large database.
const CLONE: Duration = Duration::from_secs(4 * 3600);

/// Changes that come before the order. True when the state has to be saved.
#[must_use]
pub fn before(state: &mut State, action: &Action, at: Timestamp) -> bool {
    match action {
        Action::Shrink { node } => state.shrink(node),
        Action::Widen { node } => state.widen(node),
        Action::Distrust { node } => state.distrust(node),
        Action::Outrank { stray, above } => state.outrank(stray, *above),
        Action::Note { above } => state.above = *above,
        Action::Keep { node, reason } => state.keep(node, reason.clone(), at),
        _ => return false,
    }
    true
}

/// The order of an action, to whom, and how long it may take.
#[must_use]
pub fn order(state: &State, action: &Action, rules: &Rules) -> Option<(Node, Order, Duration)> {
    let primary = || state.primary.clone();
    match action {
        Action::Lead { node, .. } => Some((node.clone(), lead(state, rules, node), LONG)),
        Action::Outrank { .. } => Some((primary(), lead(state, rules, &state.primary), LONG)),
        Action::Wake { node } => Some((node.clone(), Order::StartDetached, LONG)),
        // Its names are left alone: emptying them would release commits that nobody else has.
        Action::HaltStray { node } => Some((node.clone(), Order::Halt { how: Stop::Immediate }, SWIFT)),
        Action::WaitFor
        | Action::Shrink { .. }
        | Action::Widen { .. }
        | Action::Distrust { .. }
        | Action::Keep { .. } => Some((primary(), Order::WaitFor { nodes: state.wait_for.clone() }, SWIFT)),
        Action::Confirm { node } => Some((primary(), Order::ConfirmSync { standby: node.clone() }, LONG)),
        Action::Rejoin { node, how } => {
            let upstream = rules.addresses.get(&state.primary)?.clone();
            let limit = match how {
                Rejoin::Clone => CLONE,
                Rejoin::Rewind => REWIND,
                Rejoin::Follow => LONG,
            };
            let (slots, leads, discarded) =
                (slots(rules, node), state.above + 1, state.discarded.contains(node));
            Some((node.clone(), Order::Follow { upstream, how: *how, slots, leads, discarded }, limit))
        }
        Action::Nothing | Action::Resume | Action::FailOver { .. } | Action::Note { .. } => None,
    }
}

/// What a successful order allows. `epoch` is the one it was sent with: whatever changed since makes the answer
/// worthless. True when the state has to be saved.
#[must_use]
pub fn after(state: &mut State, action: &Action, epoch: u64, status: &NodeStatus) -> bool {
    match action {
        Action::Confirm { node } if epoch == state.epoch && status.is_writable() => {
            state.confirm(node);
            true
        }
        Action::Lead { .. } | Action::Outrank { .. } if epoch == state.epoch && status.is_writable() => {
            let above = status.sample.as_ref().map_or(0, |sample| sample.timeline.saturating_sub(1));
            let higher = above > state.above;
            state.above = state.above.max(above);
            higher
        }
        // It has nothing of its own any more.
        Action::Rejoin { node, .. } => state.discarded.remove(node),
        _ => false,
    }
}

/// The order to be the primary that is written down.
#[must_use]
pub fn lead(state: &State, rules: &Rules, node: &str) -> Order {
    Order::Promote { wait_for: state.wait_for.clone(), slots: slots(rules, node), above: state.above }
}

/// Every other node streams through a slot of its name.
#[must_use]
pub fn slots(rules: &Rules, primary: &str) -> BTreeSet<Node> {
    rules.addresses.keys().filter(|node| *node != primary).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::tests::{sample, seen};
    use crate::protocol::Postmaster;

    #[test]
    fn the_timeline_that_an_order_to_lead_reached_is_never_given_again() {
        let mut state = State::first("a".into(), "s".into(), BTreeSet::new());
        let status = |timeline| {
            let sample = sample(false, timeline, &[], Vec::new());
            seen("a", Postmaster::Running, Some(sample), None).status.unwrap()
        };
        let lead = Action::Lead { node: "a".into(), reason: String::new() };
        assert!(!after(&mut state, &lead, 1, &status(1)), "nothing new");
        assert!(after(&mut state, &lead, 1, &status(3)));
        assert_eq!(state.above, 2);
        assert!(!after(&mut state, &lead, 0, &status(9)), "of an epoch that is over");
        assert!(!after(&mut state, &lead, 1, &status(2)));
        assert_eq!(state.above, 2);
    }
}
