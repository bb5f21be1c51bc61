//! `tier0`: the whole system on one machine.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    tier0::cli::run(tier0::cli::Cli::parse())
}
