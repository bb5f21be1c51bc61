//! The real `device-simulator` against a real Mosquitto, watched by an independent subscriber.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod command_line;
mod exact;
mod outages;
mod stage;
mod users;
