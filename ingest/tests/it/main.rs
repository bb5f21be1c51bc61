//! Batches against a real Postgres.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod aborting_proxy;
mod aborts;
mod allowance;
mod audit;
mod blame;
mod cut_over;
mod dba;
mod drift;
mod encoding;
mod fixture;
mod isolation;
mod keeping;
mod letters;
mod paths;
mod pooler;
mod prepare;
mod promise;
mod refusals;
mod refused_letters;
mod replay;
mod retention;
mod same_identity;
mod sessions;
mod settings;
mod staging;
mod standby;
mod upkeep;
