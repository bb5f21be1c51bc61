//! A message in, a committed row out.
//!
//! The promise: a [`Delivery`](delivery::Delivery) is handed back for acknowledgement only after everything in it
//! is committed, as rows or as dead letters, on the primary and on its synchronous standby; and a reading that
//! comes twice is one row. Decoding, batches, binary COPY, merge, poison isolation, finding the primary, partitions
//! and migrations live here. Brokers, HTTP routes and simulators do not: a source is a queue of deliveries.

pub mod backlog;
pub mod batch;
pub mod census;
pub mod connections;
pub mod copy;
pub mod database;
pub mod dead_letter;
pub mod delivery;
pub mod failure;
mod isolation;
pub mod maintenance;
pub mod metrics;
pub mod partitions;
pub mod queue;
pub mod reading;
pub mod recent;
pub mod registry;
pub mod schema;
pub mod session;
pub mod settings;
pub mod settlement;
pub mod telemetry;
pub mod timestamp;
mod trace;
pub mod writer;
