//! What the orchestrator must never forget, and the only ways to change it.
//!
//! The invariant behind every promotion: **the primary acknowledges a commit only when every node of `sync_set`
//! has it.** It holds because `sync_set` is always within `wait_for`, the primary is only ever told to wait for
//! `wait_for`, a node leaves `sync_set` durably before the primary is told so, and enters it only after the
//! primary's confirmation. So one detached member of `sync_set` is enough to fence the primary.

use std::collections::{BTreeMap, BTreeSet};

use failover_api::{Mode, Node};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::journal::{Operation, Request};

pub const FORMAT: u32 = 1;

/// Remembered answer to a request with an `Idempotency-Key`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    pub key: String,
    /// Hash of what was asked: the same key with another question is refused.
    pub question: String,
    pub at: Timestamp,
    /// Id of the operation; its answer is in the history.
    pub operation: String,
}

/// A node whose data may be all that is left of something: nothing rewrites it until a person says so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Kept {
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// What it may hold, and how that is known.
    pub reason: String,
}

/// The world as it is, taken for the new truth by a person's word.
#[derive(Debug, Clone)]
pub struct Adoption {
    pub primary: Node,
    pub system_id: String,
    pub wait_for: BTreeSet<Node>,
    /// The highest that any agent has obeyed.
    pub epoch: u64,
    /// The highest timeline of the others that the primary has to be above.
    pub above: u32,
    /// Orchestrators that the agents have obeyed until now.
    pub displaced: BTreeSet<String>,
    /// What must not be rewritten, with the reason.
    pub kept: BTreeMap<Node, String>,
}

/// Durable. Changed through the methods only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    pub format: u32,
    /// Of this orchestrator, from its first state on: agents obey no other.
    #[serde(default)]
    pub id: String,
    /// Ids of orchestrators that a person has displaced by this one.
    #[serde(default)]
    pub displaced: BTreeSet<String>,
    /// Nodes whose data is not to be rewritten.
    #[serde(default)]
    pub kept: BTreeMap<Node, Kept>,
    /// Nodes whose data a person has given up, until it has been rewritten.
    #[serde(default)]
    pub discarded: BTreeSet<Node>,
    /// Grows with each operation, with its decision and with each change of `wait_for`; agents refuse orders of a lower one. So
    /// an order that was delayed on its way cannot undo a later one.
    pub epoch: u64,
    pub primary: Node,
    pub system_id: String,
    /// Standbys that have every acknowledged commit.
    pub sync_set: BTreeSet<Node>,
    /// Standbys the primary is told to wait for, all of them.
    pub wait_for: BTreeSet<Node>,
    /// Timelines up to this one are of earlier primaries: the primary's is above, and so is every promotion's.
    #[serde(default)]
    pub above: u32,
    pub mode: Mode,
    pub operation: Option<Operation>,
    #[serde(default)]
    pub answered: Vec<Answered>,
    /// Successful changes of the primary since the first start.
    #[serde(default)]
    pub failovers: u64,
}

/// Requests remembered for `Idempotency-Key`.
const ANSWERS: usize = 256;

impl State {
    /// What the journal holds of a change of the primary that begins now.
    #[must_use]
    pub fn opened(&self, request: Request) -> Operation {
        Operation::new(request, self.epoch, self.primary.clone(), self.sync_set.clone())
    }

    /// First start: nothing is known to be in sync.
    #[must_use]
    pub fn first(primary: Node, system_id: String, wait_for: BTreeSet<Node>) -> Self {
        Self {
            format: FORMAT,
            id: String::new(),
            displaced: BTreeSet::new(),
            kept: BTreeMap::new(),
            discarded: BTreeSet::new(),
            epoch: 1,
            primary,
            system_id,
            sync_set: BTreeSet::new(),
            wait_for,
            above: 0,
            mode: Mode::Auto,
            operation: None,
            answered: Vec::new(),
            failovers: 0,
        }
    }

    /// The primary may stop waiting for `node`. To be saved before the primary is told.
    pub fn shrink(&mut self, node: &str) {
        self.epoch += 1;
        self.sync_set.remove(node);
        self.wait_for.remove(node);
    }

    /// The primary is to wait for `node` too; it does not count as in sync yet.
    pub fn widen(&mut self, node: &str) {
        self.epoch += 1;
        self.wait_for.insert(node.to_owned());
    }

    /// The primary confirmed that `node` has everything acknowledged, while it was waiting for `wait_for`.
    pub fn confirm(&mut self, node: &str) {
        if self.wait_for.contains(node) {
            self.sync_set.insert(node.to_owned());
        }
    }

    /// The point of no return: from here on `target` is the primary, nobody else is known to have what it will
    /// acknowledge, and it acknowledges when `wait_for` have it. It leads on a timeline above `above`. The epoch grows, so
    /// that a copy of the state of before, made while the operation was in the journal, is known to be old.
    pub fn hand_over(&mut self, target: &str, wait_for: BTreeSet<Node>, above: u32) {
        self.epoch += 1;
        self.above = self.above.max(above);
        target.clone_into(&mut self.primary);
        self.kept.remove(target);
        self.discarded.clear();
        self.sync_set = BTreeSet::new();
        self.wait_for = wait_for;
    }

    /// What makes `node` a member of the sync set was seen to be untrue. Commits go on waiting for it, and it may be confirmed
    /// again. To be saved before anything else is done.
    pub fn distrust(&mut self, node: &str) {
        self.epoch += 1;
        self.sync_set.remove(node);
    }

    /// Somebody promoted `stray`, which has acknowledged nothing: the primary leads again above it.
    pub fn outrank(&mut self, stray: &str, above: u32) {
        self.shrink(stray);
        self.above = self.above.max(above);
    }

    /// The data of `node` may be all that is left of something. The epoch grows, so that state of before is known to be old.
    pub fn keep(&mut self, node: &str, reason: String, at: Timestamp) {
        self.epoch += 1;
        self.kept.entry(node.to_owned()).or_insert_with(|| Kept { since: at, reason });
    }

    /// A person gives up what only `node` may have. The epoch grows as in [`State::keep`].
    pub fn discard(&mut self, node: &str) {
        self.epoch += 1;
        self.kept.remove(node);
        self.discarded.insert(node.to_owned());
    }

    /// A person has said that `node` is the primary.
    pub fn adopt(&mut self, adoption: Adoption, at: Timestamp) {
        self.epoch = self.epoch.max(adoption.epoch) + 1;
        self.system_id = adoption.system_id;
        self.operation = None;
        self.above = self.above.max(adoption.above);
        self.displaced.extend(adoption.displaced);
        self.displaced.remove(&self.id);
        self.hand_over(&adoption.primary, adoption.wait_for, adoption.above);
        for (node, reason) in adoption.kept {
            self.keep(&node, reason, at);
        }
    }

    pub fn remember(&mut self, answered: Answered) {
        self.answered.push(answered);
        if self.answered.len() > ANSWERS {
            self.answered.remove(0);
        }
    }

    /// # Errors
    /// When the invariant does not hold: then the file was not written by us.
    pub fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {} is not known to this version ({FORMAT})", self.format));
        }
        if !self.sync_set.is_subset(&self.wait_for) {
            return Err("sync_set is not within wait_for".into());
        }
        if self.wait_for.contains(&self.primary) {
            return Err("the primary waits for itself".into());
        }
        Ok(())
    }
}
