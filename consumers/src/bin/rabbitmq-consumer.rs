//! `rabbitmq-consumer`: user activity from RabbitMQ into Postgres.

use std::process::ExitCode;

use clap::Parser;
use consumers::pipeline::Pipeline;
use consumers::rabbitmq::metrics::SourceMetrics;
use consumers::rabbitmq::returns::Returns;
use consumers::rabbitmq::settings::RabbitConsumerSettings;
use consumers::rabbitmq::source::Source;
use ingest::session;
use service::health::Health;
use service::logs::LogSettings;
use service::metrics::Registry;
use service::process::Process;
use service::settings::SettingsArgs;
use service::traces::Tracer;
use service::{http, process};

/// Consumes user activity from a RabbitMQ queue and stores the newest state of each session in Postgres. A
/// message is acknowledged only after its content is committed on the primary and its synchronous standby.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  rabbitmq-consumer --config config/tier0.toml
  rabbitmq-consumer --set rabbitmq.queue=webapp_active_users --set rabbitmq.queue_type=classic
  TIER0__RABBITMQ__PASSWORD_FILE=/run/secrets/rabbit rabbitmq-consumer --set rabbitmq.username=tier0
  rabbitmq-consumer --print-config

SIGTERM drains: reading stops, received messages are committed and acknowledged, then the process exits.
An existing queue is used unchanged. Missing queues are created unless rabbitmq.declare=false.
Exit status: 0 drained, 1 failed (also when the queue is a stream), 78 invalid settings."
)]
struct Args {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Remove the copies of refused messages from the dead-letter queue, and nothing else, instead of
    /// consuming. Each has a row in the table dead_letters. Events that the broker moved there are put back
    /// into their queue.
    #[arg(long)]
    discard_refused: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.discard_refused {
        return process::main(&args.settings, log, discard_refused);
    }
    process::main(&args.settings, log, run)
}

fn log(settings: &RabbitConsumerSettings) -> &LogSettings {
    &settings.log
}

async fn discard_refused(settings: RabbitConsumerSettings) -> anyhow::Result<()> {
    let metrics = SourceMetrics::new(&http::registry()?)?;
    let returns = Returns::new(settings.rabbitmq, metrics);
    let (removed, others) = returns.discard_refused(&Process::default().shutdown()).await?;
    tracing::info!(removed, others, "refused messages removed from the dead-letter queue");
    Ok(())
}

async fn run(settings: RabbitConsumerSettings) -> anyhow::Result<()> {
    let registry = http::registry()?;
    let health = Health::default();
    let mut process = Process::default();
    let listener = http::bind(&settings.http).await?;
    start_pipeline(&settings, &registry, &health, &mut process)?;
    // Not before: a process that has not said what it needs would be ready.
    process.serve(listener, http::routes(registry, health));
    process.run(settings.rabbitmq_consumer.grace).await
}

fn start_pipeline(
    settings: &RabbitConsumerSettings,
    registry: &Registry,
    health: &Health,
    process: &mut Process,
) -> anyhow::Result<()> {
    let tracer = Tracer::start(&settings.traces, "rabbitmq-consumer", registry, process)?;
    let pipeline = Pipeline {
        source: "rabbitmq",
        database: &settings.database,
        ingest: &settings.ingest(),
        migrate: settings.rabbitmq_consumer.migrate,
        partitions: false,
        tracer: &tracer,
    };
    let intake = pipeline.start::<session::Batch>(registry, health, process)?;
    let source_metrics = SourceMetrics::new(registry)?;
    let returns = Returns::new(settings.rabbitmq.clone(), source_metrics.clone());
    let source = Source {
        broker: settings.rabbitmq.clone(),
        settings: settings.rabbitmq_consumer.clone(),
        settlements: intake.settlements,
        health: health.dependency("broker"),
        metrics: intake.metrics,
        source_metrics,
    };
    let shutdown = process.shutdown();
    process.start("source", async move {
        // Reading starts when there is a table to write to; until then the broker keeps the messages.
        tokio::select! {
            () = intake.prepared.cancelled() => source.run(intake.queue, shutdown).await,
            () = shutdown.cancelled() => Ok(()),
        }
    });
    let shutdown = process.shutdown();
    process.start("returns", async move {
        returns.run(shutdown).await;
        Ok(())
    });
    Ok(())
}
