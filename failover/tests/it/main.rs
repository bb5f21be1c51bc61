#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "measured times, for whoever runs the test with --nocapture")]
//! Failover of real servers: Postgres under our agents, our orchestrator, kills and freezes.

mod agents;
mod callers;
mod copies;
mod disaster;
mod disks;
mod fixture;
mod hand;
mod load;
mod planned;
mod redis;
mod refusals;
mod restarts;
mod stalls;
mod traces;
mod unplanned;
