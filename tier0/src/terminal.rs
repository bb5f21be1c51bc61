//! Talking to whoever called the command.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

/// One line (or more) for whoever called the command.
pub(crate) fn say(text: impl Display) {
    // Nobody reads any more (`tier0 up | head`): no reason to stop what runs.
    drop(writeln!(std::io::stdout(), "{text}"));
}

/// A duration as an argument, for instance `60s`.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    humantime_serde::re::humantime::parse_duration(text).map_err(|error| error.to_string())
}
