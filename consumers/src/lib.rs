//! A broker's deliveries and their acknowledgements, tied to `ingest`. Knows no SQL.

pub mod mqtt;
pub mod pipeline;
pub mod rabbitmq;
pub mod unconnected;
