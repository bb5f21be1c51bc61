//! The real `mqtt-consumer` between a real broker and a real Postgres.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod bad_input;
mod broker_answers;
mod broker_truth;
mod clock;
mod command_line;
mod fake_broker;
mod floor;
mod hostile_memory;
mod large_messages;
mod leave;
mod outages;
mod queues;
mod raw_publisher;
mod returns;
mod scale_out;
mod sessions;
mod source;
mod stage;
mod traces;
