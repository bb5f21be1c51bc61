//! Single decisions that the random runs of the simulation would not miss by their effect alone.

use super::*;
use crate::protocol::{Attached, Control, NodeStatus, Sample};

const NOW: Duration = Duration::from_secs(100);

/// Two nodes, `a` and `b`.
pub(crate) fn rules() -> Rules {
    let address = |port| Upstream { host: "h".into(), port };
    Rules {
        policy: Policy::default(),
        copies: Copies::Available,
        addresses: [("a".to_owned(), address(1)), ("b".to_owned(), address(2))].into(),
    }
}

pub(crate) fn seen(
    node: &str,
    postmaster: Postmaster,
    sample: Option<Sample>,
    control: Option<Control>,
) -> Seen {
    let empty = control.is_none() && sample.is_none();
    let status = NodeStatus {
        epoch: 1,
        system_id: "s".into(),
        postmaster,
        sample,
        control,
        empty,
        ..NodeStatus::unseen(node)
    };
    Seen { status: Some(status), heard: Some(NOW), probed: Some(NOW), ..Seen::default() }
}

pub(crate) fn sample(in_recovery: bool, timeline: u32, wait_for: &[&str], standbys: Vec<Attached>) -> Sample {
    Sample {
        in_recovery,
        timeline,
        lsn: "0/5000000".parse().unwrap(),
        replayed: None,
        replay_paused: false,
        receiver: None,
        wait_for: wait_for.iter().map(|node| (*node).to_owned()).collect(),
        standbys,
        age_ms: 0,
        lag_seconds: 0.0,
    }
}

fn leads(node: &str, timeline: u32, wait_for: &[&str], standbys: Vec<Attached>) -> Seen {
    seen(node, Postmaster::Running, Some(sample(false, timeline, wait_for, standbys)), None)
}

fn stopped(node: &str, timeline: u32, state: &str, standby: bool) -> Seen {
    let control =
        Control { timeline, checkpoint: "0/4000000".parse().unwrap(), state: state.into(), standby };
    seen(node, Postmaster::Stopped { exit: None, clean: false, settled: true }, None, Some(control))
}

fn empty(node: &str) -> Seen {
    seen(node, Postmaster::Stopped { exit: None, clean: false, settled: true }, None, None)
}

fn attached(node: &str) -> Attached {
    let lsn = "0/5000000".parse().unwrap();
    Attached {
        node: node.into(),
        streaming: true,
        sync: true,
        slot: Some(node.into()),
        flushed: lsn,
        replayed: lsn,
    }
}

fn state(primary: &str, wait_for: &[&str]) -> State {
    let wait_for = wait_for.iter().map(|node| (*node).to_owned()).collect();
    let mut state = State::first(primary.into(), "s".into(), wait_for);
    state.above = 2;
    state
}

fn decided(state: &State, a: Seen, b: Seen) -> Action {
    decide(
        state,
        &View { nodes: [("a".to_owned(), a), ("b".to_owned(), b)].into(), ..View::default() },
        &rules(),
        NOW,
    )
}

#[test]
fn a_former_primary_is_rewound_unless_its_timeline_is_not_below_the_leaders() {
    let back = |timeline, clean, standby| {
        let b = stopped("b", timeline, clean, standby);
        match decided(&state("a", &[]), leads("a", 3, &[], vec![]), b) {
            Action::Rejoin { how, .. } => Some(how),
            // Two histories under one number: it was promoted by somebody, and may have what nobody else has.
            Action::Keep { .. } if timeline == 3 => None,
            // Somebody led after ours.
            Action::Nothing if timeline == 4 => None,
            other => panic!("{other:?}"),
        }
    };
    for (timeline, clean, standby, expected) in [
        (2, "in production", false, Some(Rejoin::Rewind)),
        (3, "in production", false, None),
        (4, "in production", false, None),
        (3, "shut down", false, None),
        (2, "shut down", false, Some(Rejoin::Rewind)),
        (3, "shut down in recovery", true, Some(Rejoin::Follow)),
        (2, "in archive recovery", true, Some(Rejoin::Follow)),
    ] {
        assert_eq!(back(timeline, clean, standby), expected, "{timeline} {clean} {standby}");
    }
    // Woken, it runs as a standby like any other, and still must not follow.
    let woken = |timeline| {
        let mut b = seen("b", Postmaster::Running, Some(sample(true, timeline, &[], vec![])), None);
        b.status.as_mut().unwrap().estranged = true;
        decided(&state("a", &[]), leads("a", 3, &[], vec![]), b)
    };
    assert_eq!(woken(2), Action::Rejoin { node: "b".into(), how: Rejoin::Rewind });
    assert!(matches!(woken(3), Action::Keep { .. }));
}

#[test]
fn a_former_primary_is_woken_only_when_the_primary_is_forsaken() {
    let old = || stopped("b", 1, "in production", false);
    let wake = Action::Wake { node: "b".into() };
    let state = state("a", &[]);
    assert_eq!(decided(&state, empty("a"), old()), wake, "the primary's disk is empty");
    let lost = Seen { heard: Some(Duration::ZERO), probed: None, ..leads("a", 2, &[], vec![]) };
    assert_eq!(decided(&state, lost, old()), wake, "the primary's machine is gone");
    let dead = || stopped("a", 2, "in production", false);
    assert!(matches!(decided(&state, dead(), old()), Action::Lead { .. }), "it can be started where it is");
    let failed = Seen { not_before: NOW + Duration::from_millis(1), ..dead() };
    assert_eq!(decided(&state, failed, old()), wake, "its data does not start");
    let busy = Seen { busy: true, ..dead() };
    assert_eq!(decided(&state, busy, old()), Action::Nothing, "it is being started");
    let starting = seen("a", Postmaster::Starting, None, None);
    assert_eq!(decided(&state, starting, old()), Action::Nothing, "it is starting");
    assert_eq!(
        decided(&state, empty("a"), stopped("b", 1, "in archive recovery", true)),
        Action::Rejoin { node: "b".into(), how: Rejoin::Follow },
        "a standby may follow when the primary comes back"
    );
}

#[test]
fn paused_touches_no_node_and_still_gives_a_dead_standby_up() {
    let mut paused = state("a", &["b"]);
    paused.mode = Mode::Paused;
    let away = |since: u64| Seen {
        absent_since: Some(NOW - Duration::from_secs(since)),
        absent_for: Duration::from_secs(since),
        ..stopped("b", 1, "shut down in recovery", true)
    };
    let a = |wait_for: &[&str], standbys| leads("a", 1, wait_for, standbys);
    assert_eq!(decided(&paused, a(&["b"], vec![]), away(1)), Action::Nothing, "it may be back in a moment");
    assert_eq!(decided(&paused, a(&["b"], vec![]), away(4)), Action::Shrink { node: "b".into() });
    paused.shrink("b");
    assert_eq!(decided(&paused, a(&["b"], vec![]), away(4)), Action::WaitFor);
    assert_eq!(decided(&paused, a(&[], vec![]), away(60)), Action::Nothing, "nobody starts it");
    // Somebody has started it: two copies again.
    let back = || {
        let receiver = crate::protocol::Receiver { streaming: true, host: "h".into(), port: 1, silent_ms: 0 };
        let sample = Sample { receiver: Some(receiver), ..sample(true, 1, &[], vec![]) };
        seen("b", Postmaster::Running, Some(sample), None)
    };
    assert_eq!(decided(&paused, a(&[], vec![attached("b")]), back()), Action::Widen { node: "b".into() });
    for gone in [stopped("a", 1, "in production", false), empty("a")] {
        assert_eq!(decided(&paused, gone, back()), Action::Nothing, "nobody is promoted");
    }
    paused.confirm("b");
    assert_eq!(decided(&paused, stopped("a", 1, "in production", false), back()), Action::Nothing);
}
