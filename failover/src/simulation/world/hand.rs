//! What the world does to the machines beside breaking them: an operator's hand, strangers, disks and logins.

use std::collections::BTreeSet;

use failover_api::Node;
use rand::RngExt;

use super::World;
use crate::agent::conf::GUARD;
use crate::protocol::Code;

impl World {
    fn pick(&mut self) -> Node {
        let nodes: Vec<Node> = self.machines.keys().cloned().collect();
        nodes[self.random.random_range(0..nodes.len())].clone()
    }

    /// One thing that somebody does who does not ask the orchestrator.
    pub(in crate::simulation) fn hand(&mut self) {
        let node = self.pick();
        let other = self.pick();
        let what = self.random.random_range(0..10);
        self.events.push(format!("hand {what} {node} {other}"));
        match what {
            0 | 1 => self.promote(&node),
            2 => self.start(&node),
            3 => self.stop(&node),
            4 => self.reset(&node),
            5 => {
                let codes = [Code::Space, Code::Access, Code::Connections, Code::Timeout];
                let code = codes[self.random.random_range(0..codes.len())];
                self.machines.get_mut(&node).unwrap().sick = Some(code);
            }
            6 => self.machines.get_mut(&node).unwrap().sick = None,
            7 if node != other => {
                let machine = self.machines.get_mut(&node).unwrap();
                machine.impostors.insert(other);
                machine.touched |= machine.running && !machine.standby;
                // No fence holds one that a stranger helps to acknowledge.
                machine.by_hand |= self.newest.1 != node || !machine.reachable || machine.frozen;
            }
            8 => self.machines.get_mut(&node).unwrap().impostors.clear(),
            _ => {
                let machine = self.machines.get_mut(&node).unwrap();
                machine.hung = machine.running && !machine.hung;
            }
        }
    }

    /// `pg_promote` on a standby.
    fn promote(&mut self, node: &str) {
        let machine = self.machines.get_mut(node).unwrap();
        if machine.running && machine.standby && !machine.frozen && !machine.hung {
            machine.standby = false;
            machine.upstream = None;
            machine.timeline += 1;
            machine.told = 0;
            machine.guarded = machine.wait_for.contains(GUARD) && !machine.estranged;
            let timeline = machine.timeline;
            machine.by_hand = true;
            self.timelines.insert(timeline);
        }
    }

    /// `pg_ctl start` beside the agent.
    fn start(&mut self, node: &str) {
        let machine = self.machines.get_mut(node).unwrap();
        if !machine.running && machine.data && machine.powered {
            machine.running = true;
            machine.foreign = true;
            (machine.touched, machine.by_hand) = (true, true);
        }
    }

    /// `pg_ctl stop` of what was started so.
    fn stop(&mut self, node: &str) {
        let machine = self.machines.get_mut(node).unwrap();
        if machine.foreign {
            (machine.running, machine.foreign, machine.clean, machine.guarded) = (false, false, true, false);
        }
    }

    /// `ALTER SYSTEM RESET ALL` and a reload.
    fn reset(&mut self, node: &str) {
        let machine = self.machines.get_mut(node).unwrap();
        if machine.running {
            machine.wait_for.clear();
            (machine.guarded, machine.touched) = (false, true);
            machine.by_hand |= self.newest.1 != node;
            // It has no upstream either any more.
            machine.upstream = None;
        }
    }

    /// Everything that a person can see and mend outside of the cluster is mended.
    pub(in crate::simulation) fn mend(&mut self) {
        for machine in self.machines.values_mut() {
            (machine.powered, machine.reachable, machine.frozen) = (true, true, false);
            (machine.sick, machine.hung) = (None, false);
            machine.impostors.clear();
        }
        let foreign: Vec<Node> = self
            .machines
            .iter()
            .filter(|(_, machine)| machine.foreign)
            .map(|(node, _)| node.clone())
            .collect();
        foreign.iter().for_each(|node| self.stop(node));
    }

    /// A person takes the readings of `node` to safety, and gives its data up.
    pub(in crate::simulation) fn give_up(&mut self, node: &str) {
        let log: BTreeSet<u32> = self.machines[node].log.iter().copied().collect();
        self.precious.retain(|commit| !log.contains(commit));
    }
}
