//! `region-agent`: parent of one Postgres, hands of the orchestrator.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use failover::agent::api::{self, Api};
use failover::agent::local::{Local, Ready};
use failover::agent::metrics::Metrics;
use failover::agent::node::Postgres;
use failover::agent::orders::Orders;
use failover::agent::sampler;
use failover::agent::settings::AgentSettings;
use failover::explain::explained;
use failover::priority;
use service::health::Health;
use service::process::Process;
use service::settings::SettingsArgs;
use service::{http, process};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

/// Runs one Postgres server: starts, stops, promotes, rewinds and clones it on the orchestrator's orders, and
/// reports every change at once. It decides nothing itself.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  TIER0__REGION_AGENT__TOKEN_FILE=/run/secrets/agent TIER0__REGION_AGENT__PASSWORD_FILE=/run/secrets/postgres \\
  TIER0__REGION_AGENT__REPLICATION_PASSWORD_FILE=/run/secrets/replicator region-agent --config config/tier0.toml
  region-agent --print-config

SIGTERM stops Postgres (fast), then the agent exits. If the agent dies in another way, the kernel tells Postgres to stop.
Exit status: 0 stopped on request, 1 failed, 78 invalid settings."
)]
struct Args {
    #[command(flatten)]
    settings: SettingsArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Before any other thread is there, since each thread has its own.
    let raised = priority::first();
    process::main(
        &args.settings,
        |settings: &AgentSettings| &settings.log,
        |settings| {
            priority::log(raised);
            run(settings)
        },
    )
}

async fn run(settings: AgentSettings) -> anyhow::Result<()> {
    let registry = http::registry()?;
    let health = Health::default();
    let mut process = Process::default();
    let listener = http::bind(&settings.http).await?;
    let agent = settings.region_agent;
    let tasks = TaskTracker::new();
    let node = Postgres::new(&agent, rand::random(), tasks.clone())?;
    node.inspect().await?;
    let (shared, local) = (node.shared.clone(), Local::new(&agent, &node.shared));
    let ready = Arc::new(Ready::new(local.clone(), shared.clone()));
    let orders = Orders::new(node, local.clone(), ready.clone());
    let api = Arc::new(Api::new(orders, agent.token.clone(), tasks, Metrics::new(&registry)?));
    let routes = http::routes(registry, health.clone()).merge(api::routes(api.clone()));
    process.serve(listener, explained(routes, api::SEE));
    let shutdown = process.shutdown();
    let sampling =
        sampler::sample(shared.clone(), local.clone(), ready, agent.sample_every, shutdown.clone());
    process.start("sampler", async {
        sampling.await;
        Ok(())
    });
    let role = agent.replication_user.clone();
    let marking = sampler::mark(shared, local, role, agent.mark_every, shutdown.clone());
    process.start("marker", async {
        marking.await;
        Ok(())
    });
    let grace = agent.grace;
    let guarding = api.clone();
    let until = shutdown.clone();
    process.start("guard", async move {
        guarding.orders.node().guard(until).await;
        Ok(())
    });
    process.start("postgres", async move {
        shutdown.cancelled().await;
        api.orders.end(Instant::now() + grace).await?;
        Ok(())
    });
    process.run(grace * 2).await
}
