//! What every Tier0 process has: settings, logs, a metrics and health server, and an orderly end.
//!
//! Knows no domain: nothing here names a device, a table or a broker.

pub mod backoff;
pub mod health;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod process;
pub mod secret;
pub mod settings;
pub mod traces;
