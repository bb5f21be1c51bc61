//! What travels between the processes: topics, the fleet's make-up, the ledger of accepted readings, the way to the broker,
//! the settings of a Postgres session.
//!
//! This crate does no I/O, starts no task and knows no client library (`make check` proves it with
//! `cargo tree`), so that a simulator and a consumer can agree on a shape without sharing anything else.

pub mod fleet;
pub mod ledger;
pub mod mqtt;
pub mod postgres;
pub mod rabbitmq;
pub mod sessions;
pub mod topic;
