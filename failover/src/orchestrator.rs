//! The orchestrator: watches, decides, carries out, records.
//!
//! One task, [`engine`], owns the durable state; everybody else sees copies. Watchers only note what they see. Nothing
//! here is in the writers' way: they find the primary by themselves, and go on when this process is gone.

pub mod adopt;
pub mod api;
pub mod checks;
pub mod crash;
pub mod engine;
pub mod follow;
pub mod metrics;
pub mod probe;
pub mod redis;
pub mod remote;
pub mod report;
pub mod settings;
pub mod start;
pub mod store;
mod trace;
pub mod watch;
