//! MQTT 5 to `ingest`: a persistent session whose messages are acknowledged after they are committed.

pub mod connection;
mod leave;
pub mod metrics;
pub mod settings;
pub mod source;
