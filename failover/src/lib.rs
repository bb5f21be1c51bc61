//! Regional failover: one agent beside each Postgres, one orchestrator that decides.
//!
//! What holds: a node is promoted by itself only when it holds every acknowledged commit, and only after the old
//! primary was made unable to acknowledge. That fence is a detached WAL receiver, not a timeout. This crate knows
//! nothing of telemetry, and writers do not need it to be alive.
//!
//! Deciding is apart from acting: [`decide`] and [`view`] are pure; [`operation`] carries a decision out through
//! the [`node_control::NodeControl`] of a real cluster or of a simulated one; [`orchestrator`] and [`agent`] are the edges.

pub mod agent;
pub mod decide;
pub mod explain;
pub mod history;
pub mod journal;
pub mod node_control;
pub mod operation;
pub mod orchestrator;
pub mod priority;
pub mod protocol;
pub mod state;
pub mod token;
pub mod upkeep;
pub mod view;

#[cfg(test)]
mod model;
#[cfg(test)]
mod simulation;
