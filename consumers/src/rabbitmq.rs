//! RabbitMQ to `ingest`: a durable queue whose messages are acknowledged after they are committed.

pub mod connection;
pub mod metrics;
pub mod poison;
pub mod settings;
pub mod source;
