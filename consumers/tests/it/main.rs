//! The real `mqtt-consumer` between a real broker and a real Postgres.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod bad_input;
mod command_line;
mod fake_broker;
mod floor;
mod leave;
mod outages;
mod scale_out;
mod sessions;
mod source;
mod traces;
