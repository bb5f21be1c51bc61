//! What is said of a process that has started, and how long it gets to end.

use std::time::{Duration, Instant};

/// The simulator waits for acknowledgements that may be stuck behind a full broker.
pub(super) const SIMULATOR_GRACE: Duration = Duration::from_secs(90);
pub(super) const CONSUMER_GRACE: Duration = Duration::from_secs(60);

/// What there is to say when a server got another port than it should have.
pub(super) fn taken(name: &str, wanted: u16, used: u16) -> Option<String> {
    (used != wanted).then(|| format!("  {name}: port {wanted} is taken, using {used} instead"))
}

/// The line an operator sees when something is up.
pub(super) fn up_line(name: &str, port: u16, started: Instant, note: &str) -> String {
    let address = format!("127.0.0.1:{port}");
    format!("  {name:<18}{address:<24}{:>6.2} s  {note}", started.elapsed().as_secs_f64())
}
