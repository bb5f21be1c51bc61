#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]
//! Failover of real servers: Postgres under our agents, our orchestrator, kills and freezes.

mod copies;
mod fixture;
mod load;
mod planned;
mod redis;
mod refusals;
mod restarts;
mod unplanned;
