//! What happens without the orchestrator: clients, faults, an operator.

use super::world::{Link, Wait, World, bits};

/// Something that happens without the orchestrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A client commits; `streams`: the standby has it at once.
    Commit {
        node: usize,
        streams: bool,
    },
    /// The standby receives what its primary has.
    Stream {
        node: usize,
    },
    Crash {
        node: usize,
    },
    Off {
        node: usize,
    },
    Cut {
        node: usize,
    },
    Return {
        node: usize,
    },
    RoadCut,
    RoadBack,
    /// `pg_promote` by hand.
    Promote {
        node: usize,
    },
    /// `ALTER SYSTEM RESET synchronous_standby_names`, and a reload.
    Reset {
        node: usize,
    },
    /// `pg_ctl start` beside the agent, and its end.
    StartBeside {
        node: usize,
    },
    StopBeside {
        node: usize,
    },
    /// Of the orchestrator's directory.
    Backup,
    Restore,
    /// The order that was on its way arrives.
    Late,
}

impl World {
    /// What may happen now; the first of the two also in the middle of a turn of the orchestrator.
    pub(super) fn events(&self) -> (Vec<Event>, Vec<Event>) {
        let (mut swift, mut other) = (Vec::new(), Vec::new());
        for node in 0..2 {
            let member = &self.nodes[node];
            let leads = member.running && !member.standby;
            if leads && self.left.commits > 0 {
                swift.push(Event::Commit { node, streams: false });
                if self.attached(1 - node) {
                    swift.push(Event::Commit { node, streams: true });
                }
            }
            if self.left.breaks > 0 && member.link != Link::Off {
                if member.running {
                    swift.push(Event::Crash { node });
                }
                swift.push(Event::Off { node });
                if member.link == Link::Up {
                    other.push(Event::Cut { node });
                }
            }
            if member.link != Link::Up {
                other.push(Event::Return { node });
            }
            let behind = self.nodes[1 - node].log.len() > member.log.len()
                || self.nodes[1 - node].timeline > member.timeline;
            if behind && self.attached(node) {
                other.push(Event::Stream { node });
            }
            if self.left.acts > 0 {
                if member.running && member.standby {
                    swift.push(Event::Promote { node });
                }
                if member.running && member.wait != Wait::Nobody {
                    swift.push(Event::Reset { node });
                }
                if !member.running && member.link != Link::Off {
                    swift.push(Event::StartBeside { node });
                }
            }
            if member.foreign {
                other.push(Event::StopBeside { node });
            }
        }
        if !self.road {
            other.push(Event::RoadBack);
        } else if self.left.breaks > 0 {
            other.push(Event::RoadCut);
        }
        if self.left.restores > 0 && self.backup.is_none() {
            swift.push(Event::Backup);
        }
        if self.backup.as_ref().is_some_and(|backup| *backup != self.saved) {
            other.push(Event::Restore);
        }
        if self.late.as_ref().is_some_and(|late| self.nodes[late.node].link != Link::Off) {
            other.push(Event::Late);
        }
        (swift, other)
    }

    pub(super) fn happen(&mut self, event: Event) {
        match event {
            Event::Commit { node, streams } => {
                self.left.commits -= 1;
                let used = bits(&self.nodes[0].log) | bits(&self.nodes[1].log) | self.acknowledged;
                let number = (0..8).find(|number| used & 1 << number == 0).unwrap();
                self.nodes[node].log.push(number);
                self.nodes[node].waiting += 1;
                if streams {
                    self.stream(1 - node);
                }
            }
            Event::Stream { node } => self.stream(node),
            Event::Crash { node } => {
                self.left.breaks -= 1;
                self.stop(node, false);
            }
            Event::Off { node } => {
                self.left.breaks -= 1;
                self.lose_sight(node);
                self.stop(node, false);
                self.nodes[node].link = Link::Off;
            }
            Event::Cut { node } => {
                self.left.breaks -= 1;
                self.lose_sight(node);
                self.nodes[node].link = Link::Cut;
            }
            Event::Return { node } => self.come_back(node),
            Event::RoadCut => {
                self.left.breaks -= 1;
                self.road = false;
            }
            Event::RoadBack => self.road = true,
            Event::Promote { node } => {
                self.left.acts -= 1;
                let member = &mut self.nodes[node];
                (member.standby, member.follows, member.opened) = (false, false, true);
                (member.timeline, member.told) = (member.timeline + 1, 0);
                member.guarded = member.wait == Wait::Guard && !member.estranged;
            }
            Event::Reset { node } => {
                self.left.acts -= 1;
                let member = &mut self.nodes[node];
                (member.wait, member.guarded, member.opened) = (Wait::Nobody, false, true);
                member.touched |= !member.standby;
            }
            Event::StartBeside { node } => {
                self.left.acts -= 1;
                let member = &mut self.nodes[node];
                (member.running, member.foreign, member.touched, member.opened) = (true, true, true, true);
            }
            Event::StopBeside { node } => self.stop(node, true),
            Event::Backup => self.backup = Some(self.saved.clone()),
            Event::Restore => {
                self.left.restores -= 1;
                let backup = self.backup.take().unwrap();
                self.restored = backup.0.epoch < self.saved.0.epoch;
                self.saved = backup;
                self.forget();
            }
            Event::Late => {
                let late = self.late.take().unwrap();
                drop(self.obey(late.node, late.epoch, &late.order));
            }
        }
        self.settle();
    }

    pub(super) fn come_back(&mut self, node: usize) {
        self.nodes[node].link = Link::Up;
        self.memory.last[node] = None;
    }

    fn lose_sight(&mut self, node: usize) {
        if self.nodes[node].link == Link::Up {
            self.memory.last[node] = Some(self.glance(node));
        }
    }
}
