//! A message in, a committed row out.
//!
//! The promise: a [`Delivery`](delivery::Delivery) is handed back for acknowledgement only after everything in it
//! is committed, as rows or as dead letters, on the primary and on its synchronous standby; and a reading that
//! comes twice is one row. Decoding, batches, binary COPY, merge, poison isolation, finding the primary, partitions
//! and migrations live here. Brokers, HTTP routes and simulators do not: a source is a queue of deliveries.

pub mod audit;
pub mod backlog;
pub mod batch;
pub mod clock;
pub mod connections;
pub mod copy;
pub mod database;
pub mod dead_letter;
mod decode;
pub mod deliveries;
pub mod delivery;
pub mod error_text;
pub mod failure;
mod isolation;
pub mod letter_limit;
pub mod letter_log;
pub mod maintenance;
pub mod metrics;
pub mod mqtt_sessions;
pub mod partitions;
mod probe;
pub mod queue;
pub mod reading;
pub mod recent;
pub mod registry;
pub mod replay;
pub mod schema;
pub mod session;
pub mod settings;
pub mod settlement;
pub mod site_counts;
mod staging;
pub mod telemetry;
pub mod timestamp;
pub mod tolerated;
mod trace;
pub mod transaction;
pub mod writer;
