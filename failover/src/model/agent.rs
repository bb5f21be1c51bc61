//! What an agent and its Postgres do with an order.

use failover_api::Node;

use super::seen::{name, status};
use super::world::{Link, MIXED, REWRITTEN, Wait, World, bits};
use crate::node_control::OrderError;
use crate::protocol::{Code, NodeStatus, Order, Rejoin, Stop};

impl World {
    /// An order arrives.
    pub(super) fn obey(&mut self, node: usize, epoch: u64, order: &Order) -> Result<NodeStatus, OrderError> {
        if self.nodes[node].link == Link::Off {
            return Err(OrderError::Gone(name(node)));
        }
        let answer = self.carry_out(node, epoch, order);
        self.settle();
        let refused = |code| OrderError::Refused { node: name(node), code, message: String::new() };
        answer.map(|()| status(node, &self.glance(node))).map_err(refused)
    }

    fn carry_out(&mut self, node: usize, epoch: u64, order: &Order) -> Result<(), Code> {
        let partner = 1 - node;
        let epoch = u8::try_from(epoch).unwrap();
        if epoch < self.nodes[node].epoch {
            return Err(Code::OldEpoch);
        }
        (self.nodes[node].epoch, self.nodes[node].obeys) = (epoch, true);
        // Its agent knows nothing that runs.
        let runs = self.nodes[node].running && !self.nodes[node].foreign;
        let leads = runs && !self.nodes[node].standby;
        match order {
            Order::Promote { wait_for, above, .. } => self.lead(node, waits(wait_for, partner), *above)?,
            Order::Follow { how, leads, discarded, .. } => self.stand(node, *how, *leads, *discarded)?,
            Order::StartDetached if leads => return Err(Code::Leads),
            Order::StartDetached if self.nodes[node].foreign => return Err(Code::Foreign),
            Order::StartDetached => {
                let member = &mut self.nodes[node];
                if !member.running {
                    member.estranged |= !member.standby;
                    (member.running, member.standby, member.follows) = (true, true, false);
                    (member.wait, member.told) = (Wait::Guard, 0);
                }
            }
            Order::Detach if leads => return Err(Code::Leads),
            Order::Detach if self.nodes[node].foreign => {}
            Order::Detach => self.nodes[node].follows = false,
            Order::Halt { how } if runs => {
                if leads && *how == Stop::Fast {
                    self.stream(partner);
                    self.settle();
                }
                self.stop(node, *how == Stop::Fast);
            }
            Order::WaitFor { .. } | Order::ConfirmSync { .. } | Order::Mark { .. } if !leads => {
                return Err(Code::NotPrimary);
            }
            Order::WaitFor { nodes } => {
                let member = &mut self.nodes[node];
                (member.wait, member.guarded) = (waits(nodes, partner), false);
                member.alone |= nodes.is_empty();
                // The operator's setting is gone; one that an operator promoted stays his.
                member.opened &= self.saved.0.primary != name(node);
            }
            Order::ConfirmSync { .. } => {
                if self.nodes[node].wait != Wait::Partner {
                    return Err(Code::NotWaitedFor);
                }
                if !self.attached(partner) {
                    return Err(Code::NotSync);
                }
                self.stream(partner);
                (self.nodes[node].touched, self.nodes[node].alone) = (false, false);
            }
            Order::Mark { .. } if !self.can_acknowledge(node) => return Err(Code::Timeout),
            Order::Halt { .. } | Order::Checkpoint | Order::Mark { .. } => {}
        }
        Ok(())
    }

    fn lead(&mut self, node: usize, wait: Wait, above: u32) -> Result<(), Code> {
        let above = u8::try_from(above).unwrap();
        let before = &self.nodes[node];
        if before.foreign {
            return Err(Code::Foreign);
        }
        // One that was overtaken steps back and is promoted again.
        if before.running && !before.standby && before.timeline <= above {
            self.stream(1 - node);
            self.settle();
            self.stop(node, true);
        }
        let member = &mut self.nodes[node];
        if !member.running {
            (member.running, member.told) = (true, 0);
        }
        if member.standby || member.timeline <= above {
            (member.standby, member.told) = (false, 0);
            member.timeline = member.timeline.max(above) + 1;
        }
        member.alone |= wait == Wait::Nobody;
        (member.wait, member.follows) = (wait, false);
        (member.guarded, member.estranged, member.opened) = (false, false, false);
        Ok(())
    }

    fn stand(&mut self, node: usize, how: Rejoin, leads: u32, discarded: bool) -> Result<(), Code> {
        let source = self.nodes[1 - node].clone();
        let ready = self.road && source.running && !source.standby;
        let before = &self.nodes[node];
        if before.foreign {
            return Err(Code::Foreign);
        }
        if how == Rejoin::Follow {
            if before.running && !before.standby {
                return Err(Code::Leads);
            }
            let used = before.touched || u32::from(before.timeline) >= leads;
            if before.estranged || !before.running && !before.standby && used {
                return Err(Code::Estranged);
            }
            // Postgres compares numbers and positions only.
            if ready && before.timeline == source.timeline && !source.log.starts_with(&before.log) {
                self.wrong |= MIXED;
            }
        } else {
            if !ready {
                return Err(Code::NoUpstream);
            }
            if (before.touched || before.alone) && !discarded {
                return Err(Code::Touched);
            }
            if how == Rejoin::Rewind && before.timeline >= source.timeline {
                return Err(Code::Unrewindable);
            }
            if bits(&before.log) & self.acknowledged & !bits(&source.log) != 0 {
                self.wrong |= REWRITTEN;
            }
            self.stop(node, true);
            let member = &mut self.nodes[node];
            (member.log, member.timeline) = (source.log.clone(), source.timeline);
            (member.estranged, member.touched, member.alone) = (false, false, false);
        }
        let member = &mut self.nodes[node];
        if !member.running {
            (member.running, member.told) = (true, 0);
        }
        (member.standby, member.follows, member.wait, member.opened) = (true, true, Wait::Guard, false);
        if self.attached(node) {
            self.nodes[node].alone = false;
            self.stream(node);
            return Ok(());
        }
        let diverged = ready && !source.log.starts_with(&self.nodes[node].log);
        Err(if diverged { Code::Diverged } else { Code::NotStreaming })
    }
}

fn waits(nodes: &std::collections::BTreeSet<Node>, partner: usize) -> Wait {
    if nodes.contains(&name(partner)) { Wait::Partner } else { Wait::Nobody }
}
