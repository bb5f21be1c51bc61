//! `mqtt-consumer`: device telemetry from the broker into Postgres.

use std::process::ExitCode;

use clap::Parser;
use consumers::mqtt::metrics::SourceMetrics;
use consumers::mqtt::settings::MqttConsumerSettings;
use consumers::mqtt::source::Source;
use consumers::pipeline::Pipeline;
use ingest::telemetry;
use service::health::Health;
use service::metrics::Registry;
use service::process::Process;
use service::settings::SettingsArgs;
use service::traces::Tracer;
use service::{http, process};

/// Takes device telemetry from an MQTT 5 broker and commits it to Postgres; a message is acknowledged only after its
/// readings are committed on the primary and its synchronous standby.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  mqtt-consumer --config config/tier0.toml
  TIER0__DATABASE__PASSWORD_FILE=/run/secrets/db mqtt-consumer --set mqtt.host=broker.example --set http.port=9101
  mqtt-consumer --print-config
  mqtt-consumer --leave --set mqtt_consumer.client_id=member-b --set mqtt_consumer.filter='$share/ingest/og/field/#'

SIGTERM drains: nothing more is read, what was read is committed and acknowledged, then the process ends.
Exit status: 0 drained (with --leave: left), 1 failed, 78 bad settings."
)]
struct Args {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Leave for good: unsubscribe the stopped member of this client id, commit what the broker holds for it, end its
    /// session, exit. Without this a member that is not started again is dealt messages that nobody reads
    #[arg(long)]
    leave: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let run = |settings| run(settings, args.leave);
    process::main(&args.settings, |settings: &MqttConsumerSettings| &settings.log, run)
}

async fn run(settings: MqttConsumerSettings, leave: bool) -> anyhow::Result<()> {
    let registry = http::registry()?;
    let health = Health::default();
    let mut process = Process::default();
    let listener = http::bind(&settings.http).await?;
    start_pipeline(&settings, leave, &registry, &health, &mut process)?;
    // Not before: a process that has not said what it needs would be ready.
    process.serve(listener, http::routes(registry, health));
    process.run(settings.mqtt_consumer.grace).await
}

fn start_pipeline(
    settings: &MqttConsumerSettings,
    leave: bool,
    registry: &Registry,
    health: &Health,
    process: &mut Process,
) -> anyhow::Result<()> {
    let tracer = Tracer::start(&settings.traces, "mqtt-consumer", registry, process)?;
    let pipeline = Pipeline {
        source: "mqtt",
        database: &settings.database,
        ingest: &settings.ingest,
        migrate: settings.mqtt_consumer.migrate,
        partitions: true,
        tracer: &tracer,
    };
    let intake = pipeline.start::<telemetry::Batch>(registry, health, process)?;
    let source = Source {
        broker: settings.mqtt.clone(),
        settings: settings.mqtt_consumer.clone(),
        settlements: intake.settlements,
        health: health.dependency("broker"),
        metrics: intake.metrics,
        source_metrics: SourceMetrics::new(registry)?,
    };
    let shutdown = process.shutdown();
    process.start("source", async move {
        // Reading starts when there is a table to write to; until then the broker keeps the messages.
        tokio::select! {
            () = intake.prepared.cancelled() => if leave {
                source.leave(intake.queue, shutdown.clone()).await?;
                shutdown.cancel();
            } else {
                source.run(intake.queue, shutdown).await;
            },
            () = shutdown.cancelled() => anyhow::ensure!(!leave, "not left: ended before the database was reached"),
        }
        Ok(())
    });
    Ok(())
}
