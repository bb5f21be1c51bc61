//! `failover-orchestrator`: decides who is primary, and makes it so.

use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use clap::Parser;
use failover::explain::explained;
use failover::history::History;
use failover::orchestrator::api::{self, Api, Bucket};
use failover::orchestrator::engine::Engine;
use failover::orchestrator::follow;
use failover::orchestrator::metrics::Metrics;
use failover::orchestrator::probe::Probe;
use failover::orchestrator::redis::keep::Keeper;
use failover::orchestrator::redis::{self, Redis};
use failover::orchestrator::remote::Remote;
use failover::orchestrator::settings::OrchestratorSettings;
use failover::orchestrator::store::Store;
use failover::orchestrator::watch::{self, Watched};
use failover::priority;
use service::health::Health;
use service::process::Process;
use service::settings::SettingsArgs;
use service::traces::Tracer;
use service::{http, process};

/// Monitors the Postgres servers of the regions through their agents, fails over when the primary is lost,
/// and serves the API on port 8003. Writers work without it.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  TIER0__ORCHESTRATOR__TOKEN_FILE=/run/secrets/failover TIER0__ORCHESTRATOR__AGENT_TOKEN_FILE=/run/secrets/agents \\
  failover-orchestrator --config config/tier0.toml
  curl -H \"Authorization: Bearer $TOKEN\" -X POST 'http://127.0.0.1:8003/failover/region2?dry_run=true'
  failover-orchestrator --print-config

A second orchestrator on the same directory refuses to start. kill -9 at any moment is harmless: a failover under way is
finished or rolled back at the next start. Exit status: 0 stopped on request, 1 failed, 78 invalid settings."
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
        |settings: &OrchestratorSettings| &settings.log,
        |settings| {
            priority::log(raised);
            run(settings)
        },
    )
}

async fn run(mut settings: OrchestratorSettings) -> anyhow::Result<()> {
    if settings.http.port == 0 {
        settings.http.port = 8003;
    }
    let own = settings.orchestrator;
    // The lock first: whoever does not get it must not even look as if it were serving.
    let store = Store::open(&own.dir)?;
    let history = History::open(&own.dir)?;
    let registry = http::registry()?;
    let metrics = Metrics::new(&registry)?;
    if let Some(last) = history.entries().last() {
        metrics.last(last);
    }
    let history = Arc::new(Mutex::new(history));
    let health = Health::default();
    let mut process = Process::default();
    let listener = http::bind(&settings.http).await?;
    let addresses = own.addresses().map_err(anyhow::Error::msg)?;
    let rules = own.rules().map_err(anyhow::Error::msg)?;
    let watched = Arc::new(Watched::new(addresses.keys()));
    let remote = Arc::new(Remote::new(addresses.clone(), own.agent_token.clone(), store, watched.clone())?);
    let redis = Redis::new(&settings.redis)?;
    let shutdown = process.shutdown();
    let ticking = watch::clock(watched.clone(), shutdown.clone());
    process.start("clock", async {
        ticking.await;
        Ok(())
    });
    for (node, address) in addresses {
        let seconds = metrics.probe.with_label_values(&[node.as_str()]);
        let probe = Probe {
            node: node.clone(),
            address: address.postgres,
            user: own.monitor_user.clone(),
            password: own.monitor_password.clone(),
            every: own.probe_every,
            watched: watched.clone(),
            seconds,
        };
        let probing = probe.run(shutdown.clone());
        process.start(format!("probe-{node}"), async {
            probing.await;
            Ok(())
        });
        let watching = follow::agent(node.clone(), remote.clone(), own.heartbeat, shutdown.clone());
        process.start(format!("watch-{node}"), async {
            watching.await;
            Ok(())
        });
    }
    let (seen_redis, redis_report) = tokio::sync::watch::channel(redis::unseen(redis.is_some()));
    if let Some(redis) = redis.clone() {
        let keeper = Keeper {
            redis,
            remote: remote.clone(),
            seen: seen_redis,
            known: metrics.redis_up.clone(),
            follows: metrics.redis_follows.clone(),
        };
        let keeping = keeper.run(shutdown.clone());
        process.start("keep-redis", async {
            keeping.await;
            Ok(())
        });
    }
    let (asked, questions) = tokio::sync::mpsc::channel(8);
    let engine = Engine {
        remote: remote.clone(),
        history: history.clone(),
        rules: rules.clone(),
        first_primary: own.first_primary.clone(),
        redis,
        redis_seen: redis_report.clone(),
        metrics: metrics.clone(),
        tracer: Tracer::start(&settings.traces, "failover-orchestrator", &registry, &mut process)?,
        asked: questions,
        ready: health.dependency("primary"),
        not_again_before: std::time::Duration::ZERO,
        told: None,
    };
    process.start("engine", async move { engine.run(shutdown).await.context("the engine stopped") });
    let api = Api {
        remote,
        history,
        rules,
        token: own.token,
        asked,
        redis: redis_report,
        metrics,
        under_way: AtomicBool::new(false),
        places: api::places(),
        bucket: Bucket::new(own.max_requests_per_minute),
    };
    let routes = http::routes(registry, health).merge(api::routes(Arc::new(api)));
    process.serve(listener, explained(routes, api::SEE));
    process.run(own.grace).await
}
