//! The orchestrator: watches, decides, carries out, records.

pub mod store;
