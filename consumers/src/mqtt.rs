//! MQTT 5 to `ingest`: a persistent session whose messages are acknowledged after they are committed.

pub mod connection;
pub mod error;
mod greeting;
mod leave;
pub mod metrics;
pub mod packet;
mod reason;
mod reconnect;
pub mod session_memory;
pub mod session_record;
pub mod settings;
pub mod source;
pub mod terms;
