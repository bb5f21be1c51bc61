#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod dashboards;
mod examples;
mod made;
mod outages;
mod roles;
mod servers;
mod settings;
mod up;
mod verify;
