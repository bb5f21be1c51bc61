//! RabbitMQ to `ingest`: a durable queue whose messages are acknowledged after they are committed.

pub mod connection;
pub mod letter;
pub mod metrics;
pub mod poison;
pub mod report;
pub mod returns;
pub mod settings;
pub mod source;
pub mod window;
