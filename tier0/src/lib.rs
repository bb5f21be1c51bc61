//! `tier0`: the whole system on one machine, its command line, benchmarks and drills, and the check of the ledger against the tables.
//!
//! The servers and processes are the playground's.

pub mod bench;
pub mod cli;
pub mod commands;
pub mod docs;
pub mod drill;
pub mod home;
pub mod stage;
mod terminal;
pub mod up;
pub mod verify;
