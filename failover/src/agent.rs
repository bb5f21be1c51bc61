//! The agent beside one Postgres: its parent, and the hands of the orchestrator there.
//!
//! It starts, stops, promotes, detaches, repoints, rewinds and clones its node when ordered, and says at once when
//! something changes. It never decides: a postmaster that ended stays down until an order comes, and no order of a
//! lower epoch than one already accepted is carried out. When the agent ends, however it ends, its postmaster gets a
//! fast stop from the kernel: no node runs unwatched.

pub mod api;
pub mod conf;
pub mod local;
pub mod metrics;
pub mod node;
pub mod orders;
pub mod procs;
pub mod sampler;
pub mod settings;
pub mod shared;
pub mod symptoms;
