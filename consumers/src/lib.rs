//! A broker's deliveries and their acknowledgements, tied to `ingest`. Knows no SQL.

pub mod mqtt;
pub mod pipeline;
pub mod rabbitmq;
pub mod replay;
pub mod unconnected;

/// A connection that has consumed for so long was a success: the wait before the next one is short again. Shorter ones may be
/// ended by what they carry, or by a rival, over and over.
const LASTED: std::time::Duration = std::time::Duration::from_secs(10);
