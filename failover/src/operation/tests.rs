//! How long a fence waits for whom; the simulation knows no time.

use std::sync::Mutex;
use std::time::Duration;

use std::collections::{BTreeMap, BTreeSet};

use failover_api::{Lsn, Node};

use super::*;
use crate::decide::tests::{sample, seen};
use crate::node_control::OrderError;
use crate::protocol::Upstream;
use crate::protocol::{NodeStatus, Order, Postmaster};

/// Answers of a healthy node to everything, each node after its own time; orders end with their limit.
struct Slow {
    answer_after: BTreeMap<Node, Duration>,
    led: Mutex<Option<(Node, BTreeSet<Node>)>>,
}

impl NodeControl for Slow {
    async fn order(
        &self,
        node: &str,
        _: u64,
        order: Order,
        limit: Duration,
    ) -> Result<NodeStatus, OrderError> {
        let after = self.answer_after.get(node).copied().unwrap_or_default();
        tokio::time::sleep(after.min(limit)).await;
        if after > limit {
            return Err(OrderError::Silent { node: node.into(), reason: "it hangs".into() });
        }
        let leads = match &order {
            Order::Promote { wait_for, .. } => {
                *self.led.lock().unwrap() = Some((node.into(), wait_for.clone()));
                true
            }
            Order::Mark { .. } | Order::WaitFor { .. } => true,
            _ => false,
        };
        let sample = sample(!leads, if leads { 2 } else { 1 }, &[], Vec::new());
        Ok(seen(node, Postmaster::Running, Some(sample), None).status.unwrap())
    }

    fn save(&self, state: &State) -> anyhow::Result<()> {
        state.check().map_err(anyhow::Error::msg)
    }

    fn passed(&self, _: &str) {}
}

fn nodes(names: &[&str]) -> BTreeSet<Node> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// `a` is lost, `b` takes over, `c` is the third; how long the fence took, whom the new primary waits for, what remained.
async fn taken_over(
    kind: Kind,
    sync: &[&str],
    c_after: Duration,
) -> (Duration, BTreeSet<Node>, BTreeSet<Node>) {
    let mut state = State::first("a".into(), "s".into(), nodes(&["b", "c"]));
    sync.iter().for_each(|node| state.confirm(node));
    // Only a forced one may have a source that answers.
    let a_after = if kind == Kind::Forced { Duration::ZERO } else { Duration::from_secs(3600) };
    let hands = Slow {
        answer_after: [("a".to_owned(), a_after), ("c".to_owned(), c_after)].into(),
        led: Mutex::default(),
    };
    let address = |port| Upstream { host: "h".into(), port };
    let request = Request {
        id: "1".into(),
        kind,
        target: "b".into(),
        actor: "test".into(),
        reason: String::new(),
        started_at: Timestamp::UNIX_EPOCH,
        wait_for: nodes(&["c"]),
        standbys: nodes(&["b", "c"]),
        addresses: [("a".to_owned(), address(1)), ("b".to_owned(), address(2)), ("c".to_owned(), address(3))]
            .into(),
        timeline: 1,
        marker: 0,
        acknowledged: Lsn::default(),
        bytes_at_risk: Some(0),
        two_copies: false,
    };
    let (operation, failure) = begin(&hands, &mut state, request, Instant::now()).await.unwrap();
    assert_eq!(failure, None);
    let fence = operation.steps.iter().find(|step| step.action == "fence").unwrap();
    let (leader, waits) = hands.led.into_inner().unwrap().unwrap();
    assert_eq!((leader.as_str(), state.primary.as_str()), ("b", "b"));
    (Duration::from_secs_f64(fence.duration_ms / 1000.0), waits, operation.standbys)
}

#[tokio::test(start_paused = true)]
async fn writers_do_not_wait_for_a_third_node_that_hangs() {
    let (took, waits, kept) = taken_over(Kind::Unplanned, &["b", "c"], Duration::from_secs(60)).await;
    assert!(took <= Duration::from_millis(260), "{took:?}");
    assert_eq!((waits, kept), (nodes(&[]), nodes(&["b"])));
}

#[tokio::test(start_paused = true)]
async fn a_third_node_that_is_a_little_slower_is_kept() {
    let (took, waits, kept) = taken_over(Kind::Unplanned, &["b", "c"], Duration::from_millis(200)).await;
    assert!(took >= Duration::from_millis(200), "{took:?}");
    assert_eq!((waits, kept), (nodes(&["c"]), nodes(&["b", "c"])));
}

/// Nobody's answer alone is known to suffice, so everybody's is awaited.
#[tokio::test(start_paused = true)]
async fn a_forced_one_waits_for_everybody() {
    let (took, waits, kept) = taken_over(Kind::Forced, &["b", "c"], Duration::from_secs(2)).await;
    assert!(took >= Duration::from_secs(2), "{took:?}");
    assert_eq!((waits, kept), (nodes(&["c"]), nodes(&["b", "c"])));
}

/// .. but not for ever, and it is carried out all the same.
#[tokio::test(start_paused = true)]
async fn a_forced_one_is_not_held_up_by_who_hangs() {
    let (took, waits, kept) = taken_over(Kind::Forced, &["c"], Duration::from_secs(60)).await;
    assert!(took <= Duration::from_millis(3500), "{took:?}");
    assert_eq!((waits, kept), (nodes(&[]), nodes(&["b"])));
}
