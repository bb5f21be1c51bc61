//! The people of the simulation: one who restores and promotes without asking, and one on call who follows the alarms.

use failover_api::Node;
use rand::RngExt;

use super::{Run, World};
use crate::node_control::NodeControl;
use crate::orchestrator::adopt::{self, AdoptQuestion};
use crate::orchestrator::report;

impl Run {
    /// Something is done that the orchestrator is not told of.
    pub(super) fn hand(&mut self) {
        if self.backups.len() < 40 {
            self.backups.push(self.state.clone());
        }
        let restored = self.world(|world| world.random.random_bool(0.1));
        if restored {
            // Its directory as it was once, and the process started anew.
            let index = self.world(|world| world.random.random_range(0..self.backups.len()));
            let old = self.backups[index].clone();
            self.world(|world| {
                world.events.push(format!("state restored {old:?}"));
                world.saved = old;
                world.forgotten();
                // No order of before is still on its way when a person has done that.
                world.late.clear();
            });
            self.reincarnate();
        } else {
            self.world(World::hand);
        }
    }

    /// Whoever is on call does what the alarms say, and nothing else.
    pub(super) fn follow_alarms(&mut self) {
        let mut view = self.view();
        // By now it is missing for long enough.
        for seen in view.nodes.values_mut() {
            seen.absent_since = seen.absent_since.map(|_| std::time::Duration::ZERO);
        }
        let alarms = report::alarms(&self.state, &view, &self.rules, self.now).join("\n");
        assert!(
            !alarms.is_empty() || self.idle < 5,
            "not whole, and nobody is told: {:#?} {:#?} {:#?}",
            self.state,
            self.world(|world| world.machines.clone()),
            self.world(|world| world.events.clone())
        );
        if alarms.contains("POST /adopt/") {
            self.adopt();
        } else if let Some(node) = self.state.kept.keys().next().cloned() {
            assert!(alarms.contains(&format!("POST /discard/{node}")), "{alarms}");
            self.world(|world| world.give_up(&node));
            self.state.discard(&node);
            self.hands.save(&self.state).unwrap();
        }
    }

    fn adopt(&mut self) {
        let view = self.view();
        let judged = |region: &Node, allow_data_loss| {
            let question =
                AdoptQuestion { region: region.clone(), allow_data_loss, ..AdoptQuestion::default() };
            adopt::judge(&question, Some(&self.state), &view, &self.rules, self.now)
        };
        let mut possible: Vec<_> = [false, true]
            .into_iter()
            .flat_map(|loss| self.rules.addresses.keys().map(move |region| (loss, region)))
            .filter_map(|(loss, region)| {
                let verdict = judged(region, loss);
                let facts = verdict.facts.iter().find(|facts| facts.region == *region)?;
                Some((loss, std::cmp::Reverse((facts.timeline, facts.lsn)), verdict.outcome.ok()?))
            })
            .collect();
        possible.sort_by_key(|(loss, position, _)| (*loss, *position));
        let Some((_, _, adoption)) = possible.into_iter().next() else { return };
        let region = adoption.primary.clone();
        self.world(|world| {
            world.accept_loss(&region);
            world.split = true;
            // What the others acknowledge until they are stopped stays in their data, which is kept.
            for (_, machine) in world.machines.iter_mut().filter(|(node, _)| **node != region) {
                machine.by_hand = true;
            }
        });
        self.world(|world| world.events.push(format!("{adoption:?}")));
        self.state.adopt(adoption, jiff::Timestamp::UNIX_EPOCH);
        self.hands.save(&self.state).unwrap();
        self.cures.clear();
    }
}
