//! For tests only: ends the process, as `kill -9` would, right after a named step was made durable.
//!
//! Compiled to nothing without the feature `crash-hooks`, which only this crate's own tests switch on. With it, the
//! environment variable `TIER0_CRASH_AFTER` names the step.

/// Called after each durable step.
#[cfg(feature = "crash-hooks")]
pub fn after(step: &str) {
    if std::env::var("TIER0_CRASH_AFTER").is_ok_and(|name| name == step) {
        tracing::warn!(step, "TIER0_CRASH_AFTER: dying here");
        if let Err(error) = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL) {
            tracing::error!(%error, "not dead");
        }
    }
}

/// Called after each durable step.
#[cfg(not(feature = "crash-hooks"))]
pub fn after(_step: &str) {}
