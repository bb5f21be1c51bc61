#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]
#![allow(
    clippy::print_stdout,
    reason = "what runbooks had typed and what came of it, for whoever reads a failure"
)]

mod dashboards;
mod examples;
mod faults;
mod made;
mod outages;
mod roles;
mod runbooks;
mod settings;
mod up;
mod verify;
