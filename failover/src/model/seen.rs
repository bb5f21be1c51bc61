//! The world as the orchestrator sees it.

use std::time::Duration;

use failover_api::{Lsn, Node};

use super::world::{Glance, Link, Wait, World};
use crate::agent::conf::GUARD;
use crate::decide::Rules;
use crate::protocol::{Attached, Control, NodeStatus, Postmaster, Receiver, Sample, Upstream};
use crate::view::{Seen, View};

pub(super) const NOW: Duration = Duration::from_secs(100);

pub(super) fn name(node: usize) -> Node {
    if node == 0 { "a".into() } else { "b".into() }
}

pub(super) fn index(node: &str) -> usize {
    usize::from(node == "b")
}

fn address(node: usize) -> Upstream {
    Upstream { host: "h".into(), port: node as u16 + 1 }
}

/// Past the last record, as Postgres' received position is.
fn lsn(commits: usize) -> Lsn {
    Lsn(commits as u64 * 10 + 1)
}

/// What the agent of a node says.
pub(super) fn status(node: usize, glance: &Glance) -> NodeStatus {
    let Glance { member, standby, streams } = glance;
    let partner = name(1 - node);
    let attached = standby.map(|has| Attached {
        node: partner.clone(),
        streaming: true,
        sync: member.wait == Wait::Partner,
        slot: Some(partner.clone()),
        flushed: lsn(usize::from(has)),
        replayed: lsn(usize::from(has)),
    });
    let Upstream { host, port } = address(1 - node);
    let receiver = streams.then_some(Receiver { streaming: true, host, port, silent_ms: 0 });
    let shown = member.running && !member.foreign;
    let sample = shown.then(|| Sample {
        in_recovery: member.standby,
        timeline: member.timeline.into(),
        lsn: lsn(member.log.len()),
        replayed: None,
        replay_paused: false,
        receiver,
        wait_for: match member.wait {
            Wait::Nobody => [].into(),
            Wait::Partner => [partner].into(),
            Wait::Guard => [GUARD.to_owned()].into(),
        },
        standbys: attached.into_iter().collect(),
        age_ms: 0,
        lag_seconds: 0.0,
    });
    let control = (!shown).then(|| Control {
        timeline: member.timeline.into(),
        checkpoint: Lsn(lsn(member.log.len()).0 - 1),
        state: if member.clean { "shut down" } else { "in production" }.into(),
        standby: member.standby,
    });
    let stopped = Postmaster::Stopped { exit: None, clean: member.clean, settled: true };
    NodeStatus {
        epoch: member.epoch.into(),
        system_id: "s".into(),
        postmaster: if shown { Postmaster::Running } else { stopped },
        upstream: member.follows.then(|| address(1 - node)),
        sample,
        control,
        acknowledged: Lsn(u64::from(member.told) * 10),
        orchestrator: if member.obeys { "o".into() } else { String::new() },
        foreign: member.foreign.then_some(1),
        touched: member.touched,
        alone: member.alone,
        guarded: member.guarded && shown,
        estranged: member.estranged,
        ..NodeStatus::unseen(&name(node))
    }
}

/// `long`: a standby that is missing is missing for long.
pub(super) fn view(world: &World, primary: &str, rules: &Rules, long: bool) -> View {
    let mut view = View { noted: NOW, failed_fences: world.memory.failed_fences.into(), ..View::default() };
    for node in 0..2 {
        let member = &world.nodes[node];
        let up = member.link == Link::Up;
        let now = world.glance(node);
        let last = if up { Some(&now) } else { world.memory.last[node].as_ref() };
        let answers = |when: bool| if when { Some(NOW) } else { last.map(|_| Duration::ZERO) };
        let cure = world.memory.cures[node];
        let seen = Seen {
            status: last.map(|glance| status(node, glance)),
            heard: answers(up),
            agent_refused: member.link == Link::Off,
            probed: answers(up && member.running),
            probe_refused: up && !member.running || member.link == Link::Off,
            cure: cure.map(|cure| cure.how()),
            tries: u32::from(cure.is_some()),
            beat: (0, NOW),
            ..Seen::default()
        };
        view.nodes.insert(name(node), seen);
    }
    view.note(primary, NOW, &rules.policy);
    for seen in view.nodes.values_mut().filter(|seen| seen.absent_since.is_some() && long) {
        (seen.absent_since, seen.absent_for) = (Some(Duration::ZERO), Duration::from_secs(60));
    }
    view
}
