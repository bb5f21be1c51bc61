//! `device-simulator`: a fleet of field devices that publishes telemetry over MQTT 5.
//!
//! Promise: every reading the broker acknowledged is in the ledger once, and nothing else is in its tallies. What
//! was sent but never answered is listed as unknown. Absence: no queue of readings; when the broker does not take
//! them the machines take none, and that is counted.

pub mod account;
pub mod connection;
pub mod machine;
pub mod message;
pub mod metrics;
pub mod payload;
pub mod protocol;
pub mod publisher;
pub mod report;
pub mod run;
pub mod settings;
pub mod shared;
pub mod trouble;
pub mod watch;
pub mod window;
