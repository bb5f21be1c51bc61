//! The command line of `tier0`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::bench::growth::GrowthArgs;
use crate::bench::sessions::BenchSessionsArgs;
use crate::bench::{self, BenchArgs};
use crate::commands::failover::FailoverArgs;
use crate::commands::person::{AdoptArgs, DiscardArgs};
use crate::drill::{self, Drill};
use crate::home::Home;
use crate::up::args::UpArgs;
use crate::{commands, docs, up};

/// Starts, watches and checks the whole system on one machine: real servers as children of this command, with their
/// data below .tier0/, never touching what runs system-wide.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  tier0 up                               100,000 devices, every 5 s each, until Ctrl-C
  tier0 up --for 60s --fresh             one minute on empty tables, then the verdict
  tier0 up --without device-simulator    bring your own client: mosquitto_pub -t og/field/SITE/TYPE/ID -m ...
  tier0 status                           regions, roles, lag, processes
  tier0 failover region2                 make the other region the primary
  tier0 psql                             SQL on the primary while it runs (and after)
  tier0 logs mqtt-consumer -f"
)]
pub struct Cli {
    /// Where state and data are kept
    #[arg(long, global = true, value_name = "DIR", env = "TIER0_DIR", default_value = ".tier0")]
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything, show it live, and check the ledger at the end
    #[command(
        after_help = "Ctrl-C drains: the simulator waits for its acknowledgements, the consumer commits what the \
broker holds, then every device is checked on every node. A second Ctrl-C aborts.
Exit status: 0 when everything acknowledged is stored exactly once, 1 otherwise, 130 when aborted."
    )]
    Up(UpArgs),
    /// What runs: regions, their roles and lag, processes, ports, memory
    Status,
    /// Make a region the primary
    #[command(
        after_help = "The old primary becomes a standby; Redis follows. Refused when something acknowledged could be lost.
Exit status: 0 done (or possible, with --dry-run), 1 refused or failed.
Examples:
  tier0 failover region2 --dry-run
  tier0 failover region2
  tier0 failover region2 --json | jq .write_gap_ms"
    )]
    Failover(FailoverArgs),
    /// Take the world as it is for the truth: this region is the primary
    #[command(
        after_help = "For when the orchestrator says that its state is older than the facts: its directory was lost or restored, somebody has
promoted a region by hand, or a second orchestrator is to take over. Destroys nothing: what may hold readings that the region lacks is kept.
Exit status: 0 done (or possible, with --dry-run), 1 refused or failed.
Examples:
  tier0 adopt region2 --dry-run
  tier0 adopt region2 --reason promoted-by-hand"
    )]
    Adopt(AdoptArgs),
    /// Give up the data of a region that is kept
    #[command(
        after_help = "Take out what is missing first: docs/runbooks/kept-source.md tells how. Its data is then rewritten from the primary.
Exit status: 0 done (or possible, with --dry-run), 1 refused or failed.
Examples:
  tier0 discard region1 --dry-run
  tier0 discard region1 --reason readings-taken-out"
    )]
    Discard(DiscardArgs),
    /// End a running `up` in order and wait for it
    Down {
        /// Kill at once instead of draining
        #[arg(long)]
        now: bool,
    },
    /// Show the log of one process
    Logs {
        /// region1, region2, mosquitto, rabbitmq, mqtt-consumer, rabbitmq-consumer, device-simulator, user-simulator; without it the names are listed
        name: Option<String>,
        /// Keep showing what is added
        #[arg(short, long)]
        follow: bool,
    },
    /// Measure the pipeline beside the limits of this machine
    #[command(
        after_help = "Starts its own servers on free ports; nothing of `up` is touched. Takes about five minutes.
Examples:
  tier0 bench
  tier0 bench --only broker-qos1 --only database --only ours-qos1 --rounds 5"
    )]
    Bench(BenchArgs),
    /// Measure how the rates hold as the table grows, and draw them
    #[command(
        after_help = "Starts its own servers on free ports. 50 million rows take about fifteen minutes and 80 GB of disk for both nodes.
Example:
  tier0 bench-growth --rows 10000000 --step 1000000 --chart growth.svg"
    )]
    BenchGrowth(GrowthArgs),
    /// Measure user activity through RabbitMQ beside the broker's limit
    BenchSessions(BenchSessionsArgs),
    /// Measure how long nobody can write when a region is lost, beside what Postgres itself needs
    #[command(
        after_help = "Starts its own servers on free ports; nothing of `up` is touched. About eight minutes with the defaults.
Promised: median write gap at most 1 s planned, 0.25 s postmaster killed, 0.5 s node killed, 1.5 s node frozen; Redis within
5 s; every operation in less than 5 s; nothing lost, nothing stored twice. Each that is not kept is one line, NOT KEPT ..
Exit status: 0 all kept, or --no-bounds; 1 not kept, or the run failed.
Examples:
  tier0 bench-failover
  tier0 bench-failover --only postmaster_kill --only floor --rounds 20
  tier0 bench-failover --rounds 1 --rate 1000 --no-bounds"
    )]
    BenchFailover(bench::failover::FailoverBenchArgs),
    /// Break things on purpose under load and check that nothing is lost
    Drill {
        #[command(subcommand)]
        drill: Drill,
    },
    /// Write the files that are made from the code: config/tier0.toml, docs/configuration.md, docs/metrics.md
    #[command(hide = true)]
    Docs,
    /// Open psql on one node; nodes that do not run are started for the session
    Psql {
        /// `primary` or `standby`, whichever node that is now; or `region1`, `region2`
        #[arg(default_value = "primary", value_name = "NODE")]
        node: String,
        /// As the superuser instead of as the owner of tier0_db
        #[arg(long)]
        admin: bool,
        /// What follows goes to psql [example: tier0 psql region2 -- -c 'SELECT 1']
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Check the ledger of the last run against the tables, device by device, on every node
    Verify {
        /// Print the report as JSON
        #[arg(long)]
        json: bool,
        /// Another ledger than that of the last run
        #[arg(long, value_name = "FILE")]
        ledger: Option<PathBuf>,
    },
}

/// Runs the command; the exit status says whether it succeeded.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("start the runtime")),
    };
    let outcome = runtime.block_on(async {
        let home = Home::open(&cli.dir)?;
        match cli.command {
            Command::Up(args) => up::run(&home, args).await,
            Command::Status => commands::status(&home).await,
            Command::Failover(args) => commands::failover::failover(&home, &args).await,
            Command::Adopt(args) => commands::person::adopt(&home, &args).await,
            Command::Discard(args) => commands::person::discard(&home, &args).await,
            Command::Down { now } => commands::down(&home, now).await,
            Command::Logs { name, follow } => commands::logs(&home, name.as_deref(), follow).await,
            Command::Bench(args) => bench::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::BenchGrowth(args) => bench::growth::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::BenchSessions(args) => bench::sessions::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::BenchFailover(args) => bench::failover::run(args).await,
            Command::Docs => docs::write().map(|()| ExitCode::SUCCESS),
            Command::Drill { drill } => drill::run(drill).await,
            Command::Psql { node, admin, args } => commands::psql(&home, &node, admin, &args).await,
            Command::Verify { json, ledger } => commands::verify(&home, json, ledger.as_deref()).await,
        }
    });
    // A thread that reads the keyboard may still be blocked; the process ends all the same.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| fail(&error))
}

fn fail(error: &anyhow::Error) -> ExitCode {
    drop(writeln!(std::io::stderr(), "tier0: {error:#}"));
    ExitCode::FAILURE
}
