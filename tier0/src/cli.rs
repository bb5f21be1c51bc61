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

/// Starts, monitors and verifies the whole system on one machine. The servers are child processes of this
/// command, with their data below .tier0/. System-wide services are not touched.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  tier0 up                               100,000 devices, every 5 s each, until Ctrl-C
  tier0 up --for 60s --fresh             one minute on empty tables, then the verdict
  tier0 up --without device-simulator    use your own client: mosquitto_pub -t og/field/SITE/TYPE/ID -m ...
  tier0 status                           regions, roles, lag, processes
  tier0 failover region2                 make the other region the primary
  tier0 psql                             SQL on the primary while it runs (and after)
  tier0 logs mqtt-consumer -f"
)]
pub struct Cli {
    /// Directory for state and data
    #[arg(long, global = true, value_name = "DIR", env = "TIER0_DIR", default_value = ".tier0")]
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the whole system, show it live, and verify the ledger at the end
    #[command(
        after_help = "Ctrl-C drains: the simulator waits for its acknowledgements, the consumer commits what the \
broker holds, then every device is verified on every node. A second Ctrl-C aborts.
Exit status: 0 when every acknowledged reading is stored exactly once, 1 otherwise, 130 when aborted."
    )]
    Up(UpArgs),
    /// Show what is running: regions, roles, lag, processes, ports, memory
    Status,
    /// Make a region the primary
    #[command(
        after_help = "The old primary becomes a standby, and Redis follows. Refused when acknowledged data could be lost.
Exit status: 0 done (or possible, with --dry-run), 1 refused or failed.
Examples:
  tier0 failover region2 --dry-run
  tier0 failover region2
  tier0 failover region2 --json | jq .write_gap_ms"
    )]
    Failover(FailoverArgs),
    /// Tell an orchestrator in doubt that this region is the primary
    #[command(
        after_help = "Use it when the orchestrator reports that its state is in doubt: its directory was lost or restored, somebody promoted a
region by hand, or a second orchestrator is to take over. Destroys nothing: data that may contain readings the region lacks is kept.
Exit status: 0 done (or possible, with --dry-run), 1 refused or failed.
Examples:
  tier0 adopt region2 --dry-run
  tier0 adopt region2 --reason promoted-by-hand"
    )]
    Adopt(AdoptArgs),
    /// Discard the kept data of a region
    #[command(
        after_help = "Copy the missing readings first: see docs/runbooks/kept-source.md. The region's data is then rewritten from the primary.
Exit status: 0 done (or possible, with --dry-run), 1 refused or failed.
Examples:
  tier0 discard region1 --dry-run
  tier0 discard region1 --reason readings-taken-out"
    )]
    Discard(DiscardArgs),
    /// Stop a running `up` in order and wait for it
    Down {
        /// Kill at once instead of draining
        #[arg(long)]
        now: bool,
    },
    /// Show the log of one process
    Logs {
        /// region1, region2, mosquitto, rabbitmq, mqtt-consumer, rabbitmq-consumer, device-simulator, user-simulator; without it the names are listed
        name: Option<String>,
        /// Follow the log
        #[arg(short, long)]
        follow: bool,
    },
    /// Measure the pipeline compared with the limits of this machine
    #[command(
        after_help = "Starts its own servers on free ports and does not touch those of `up`. Takes about five minutes.
Examples:
  tier0 bench
  tier0 bench --only broker-qos1 --only database --only ours-qos1 --rounds 5"
    )]
    Bench(BenchArgs),
    /// Measure how the rates change as the table grows, and draw a chart
    #[command(
        after_help = "Starts its own servers on free ports. 50 million rows take about fifteen minutes and 80 GB of disk for both nodes.
Example:
  tier0 bench-growth --rows 10000000 --step 1000000 --chart growth.svg"
    )]
    BenchGrowth(GrowthArgs),
    /// Measure user activity through RabbitMQ compared with the broker's limit
    BenchSessions(BenchSessionsArgs),
    /// Measure the write gap of failovers compared with the floor: kill and promote by hand
    #[command(
        after_help = "Starts its own servers on free ports and does not touch those of `up`. About eight minutes with the defaults.
Limits: median write gap compared with the floor of the same run at most 3.3 times planned, 1.7 times postmaster killed, 2.2 times
node killed, 0.8 s more node frozen; worst gap 2.5 times the median; rejoin in 5 s (worst 10 s); Redis within 5 s; every operation in less
than 5 s; nothing lost, nothing stored twice. Each limit that is exceeded is one line, NOT KEPT ..
Exit status: 0 all limits kept, or --no-bounds; 1 a limit exceeded, or the run failed.
Examples:
  tier0 bench-failover
  tier0 bench-failover --only postmaster_kill --only floor --rounds 20
  tier0 bench-failover --rounds 1 --rate 1000 --no-bounds"
    )]
    BenchFailover(bench::failover::FailoverBenchArgs),
    /// Inject faults under load and check that nothing is lost
    Drill {
        #[command(subcommand)]
        drill: Drill,
    },
    /// Write the files that are generated from the code: config/tier0.toml, docs/configuration.md,
    /// docs/metrics.md
    #[command(hide = true)]
    Docs,
    /// Open psql on one node; nodes that are not running are started for the session
    Psql {
        /// `primary` or `standby`, whichever node that is now; or `region1`, `region2`
        #[arg(default_value = "primary", value_name = "NODE")]
        node: String,
        /// Connect as the superuser instead of the owner of tier0_db
        #[arg(long)]
        admin: bool,
        /// Arguments for psql [example: tier0 psql region2 -- -c 'SELECT 1']
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Compare the ledger of the last run with the tables, device by device, on every node
    Verify {
        /// Print the report as JSON
        #[arg(long)]
        json: bool,
        /// Use another ledger than that of the last run
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
