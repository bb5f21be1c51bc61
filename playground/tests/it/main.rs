#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod dashboards;
mod outages;
mod servers;
mod settings;
mod up;
mod verify;
