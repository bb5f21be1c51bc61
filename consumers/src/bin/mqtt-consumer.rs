//! `mqtt-consumer`: device telemetry from the broker into Postgres.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use consumers::mqtt::metrics::SourceMetrics;
use consumers::mqtt::session_memory::SessionMemory;
use consumers::mqtt::session_record::SessionRecord;
use consumers::mqtt::settings::MqttConsumerSettings;
use consumers::mqtt::source::Source;
use consumers::pipeline::Pipeline;
use consumers::replay::{self, ReplayArgs};
use ingest::telemetry;
use service::health::Health;
use service::logs::LogSettings;
use service::metrics::Registry;
use service::process::Process;
use service::settings::SettingsArgs;
use service::traces::Tracer;
use service::{http, process};

/// Consumes device telemetry from an MQTT 5 broker and commits it to Postgres. A message is acknowledged only
/// after its readings are committed on the primary and its synchronous standby.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  mqtt-consumer --config config/tier0.toml
  TIER0__DATABASE__PASSWORD_FILE=/run/secrets/db mqtt-consumer --set mqtt.host=broker.example --set http.port=9101
  mqtt-consumer --print-config
  mqtt-consumer --leave --set mqtt_consumer.client_id=member-b --set mqtt_consumer.filter='$share/ingest/og/field/#'
  mqtt-consumer --replay-dead-letters --reason timestamp_out_of_range --since 2d --dry-run

SIGTERM drains: reading stops, received messages are committed and acknowledged, then the process exits.
Exit status: 0 drained (with --leave: left; with --replay-dead-letters: all processed), 1 failed, 78 invalid settings."
)]
struct Args {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Remove the stopped member with this client id permanently: unsubscribe it, commit what the broker
    /// holds for it, end its session, and exit. Without this, the broker keeps sending messages to a member
    /// that is not started again
    #[arg(long)]
    leave: bool,
    #[command(flatten)]
    replay: ReplayArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    fn log(settings: &MqttConsumerSettings) -> &LogSettings {
        &settings.log
    }
    if args.replay.replay_dead_letters {
        process::main(&args.settings, log, |settings| replay(settings, args.replay))
    } else {
        process::main(&args.settings, log, |settings| run(settings, args.leave))
    }
}

async fn replay(settings: MqttConsumerSettings, args: ReplayArgs) -> anyhow::Result<()> {
    let mut process = Process::default();
    replay::start(args, &settings.database, &settings.ingest, &Health::default(), &mut process)?;
    process.run(settings.mqtt_consumer.grace).await
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
    let source_metrics = SourceMetrics::new(registry)?;
    let sessions = Arc::new(SessionMemory::default());
    let record =
        SessionRecord::new(intake.database, &settings.mqtt, &settings.mqtt_consumer, sessions.clone());
    let source = Source {
        broker: settings.mqtt.clone(),
        settings: settings.mqtt_consumer.clone(),
        settlements: intake.settlements,
        health: health.dependency("broker"),
        metrics: intake.metrics,
        source_metrics,
        sessions,
    };
    process.start("session-record", {
        let (record, shutdown) = (record.clone(), process.shutdown());
        async move {
            record.keep(shutdown).await;
            Ok(())
        }
    });
    let shutdown = process.shutdown();
    process.start("source", async move {
        // Reading starts when there is a table to write to; until then the broker keeps the messages.
        tokio::select! {
            () = intake.prepared.cancelled() => {}
            () = shutdown.cancelled() => {
                anyhow::ensure!(!leave, "not left: ended before the database was reached");
                return Ok(());
            }
        }
        if let Some(at) = record.recall().await {
            source.source_metrics.set_session_lost_at(at);
        }
        if leave {
            let left = source.leave(intake.queue, shutdown.clone()).await;
            record.close().await;
            left?;
            shutdown.cancel();
        } else {
            source.run(intake.queue, shutdown).await;
        }
        Ok(())
    });
    Ok(())
}
