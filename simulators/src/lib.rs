//! The fleet and the users of Tier0, made up by seed, with a ledger of what the broker accepted.
//!
//! Publishes and remembers; knows no database and never reads back what it sent.

pub mod device;
pub mod ledger_file;
pub mod pacing;
pub mod seeds;
pub mod user;
