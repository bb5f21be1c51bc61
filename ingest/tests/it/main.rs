//! Batches against a real Postgres.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod cut_over;
mod encoding;
mod fixture;
mod paths;
mod sessions;
mod standby;
mod upkeep;
