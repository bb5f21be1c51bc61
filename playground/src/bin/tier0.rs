//! `tier0`: the whole system on one machine.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    playground::cli::run(playground::cli::Cli::parse())
}
