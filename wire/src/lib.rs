//! What travels between the processes: topics, the fleet's make-up, the ledger of accepted readings, the way to the broker.
//!
//! This crate does no I/O, starts no task and knows no client library (`make check` proves it with
//! `cargo tree`), so that a simulator and a consumer can agree on a shape without sharing anything else.

pub mod fleet;
pub mod ledger;
pub mod mqtt;
pub mod rabbitmq;
pub mod sessions;
pub mod topic;
