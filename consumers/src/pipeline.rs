//! From a source's messages to committed rows, whatever the broker: queue, writers, upkeep, as tasks of one process.

use std::sync::Arc;

use ingest::audit::Audit;
use ingest::batch::Batch;
use ingest::clock::{Clock, Watch};
use ingest::database::Database;
use ingest::letter_log::LetterLog;
use ingest::maintenance::Maintenance;
use ingest::metrics::{AuditMetrics, Metrics};
use ingest::queue::Sender;
use ingest::settings::{DatabaseSettings, IngestSettings};
use ingest::settlement::Settlements;
use ingest::writer::Writer;
use ingest::{backlog, connections, queue};
use service::health::Health;
use service::metrics::Registry;
use service::process::Process;
use service::traces::Tracer;
use tokio_util::sync::CancellationToken;

/// What is started.
#[derive(Debug)]
pub struct Pipeline<'s> {
    /// Goes into dead letters, for instance `mqtt`.
    pub source: &'static str,
    pub database: &'s DatabaseSettings,
    pub ingest: &'s IngestSettings,
    /// Bring the schema up to date first.
    pub migrate: bool,
    /// Keep the partitions of telemetry.
    pub partitions: bool,
    /// Is told of each batch.
    pub tracer: &'s Tracer,
}

/// What the source works with.
#[derive(Debug)]
pub struct Intake {
    pub queue: Sender,
    pub settlements: Arc<Settlements>,
    pub metrics: Metrics,
    pub database: Database,
    /// Cancelled when there is a table to write to. Until then the broker keeps the messages.
    pub prepared: CancellationToken,
}

impl Pipeline<'_> {
    /// Starts the upkeep and the writers; `B` is what they commit. They end when the queue's sender is dropped.
    ///
    /// # Errors
    /// When the settings name no node, or a metric is registered already.
    pub fn start<B: Batch>(
        self,
        registry: &Registry,
        health: &Health,
        process: &mut Process,
    ) -> anyhow::Result<Intake> {
        let ingest = self.ingest;
        let metrics = Metrics::new(registry)?;
        // One connection for each writer, one for the upkeep of the tables, one for a look at them, one for the audit, one for the
        // question what time it is.
        let database = Database::new(self.database, ingest.writers + 4, health.dependency("postgres"))?;
        let clock = Clock::new(ingest);
        let bytes = usize::try_from(ingest.queue_bytes.as_u64())?;
        let (sender, receiver) = queue::bounded(ingest.queue_messages, bytes, B::memory(ingest));
        let settlements = Arc::new(Settlements::new(ingest.writers));
        connections::export(registry, database.clone())?;
        backlog::export(registry, sender.level(), settlements.clone())?;
        let maintenance = Maintenance {
            database: database.clone(),
            settings: ingest.clone(),
            clock: clock.clone(),
            metrics: metrics.clone(),
            migrate: self.migrate,
            partitions: self.partitions,
        };
        let prepared = CancellationToken::new();
        let upkeep = maintenance.run(prepared.clone(), process.shutdown());
        process.start("maintenance", async move {
            upkeep.await;
            Ok(())
        });
        let audit = Audit::new(AuditMetrics::new(registry)?);
        // Sessions are never dropped.
        let retention = self.partitions.then_some(ingest.retention);
        let look_again =
            audit.clone().run::<B>(database.clone(), clock.clone(), retention, process.shutdown());
        process.start("audit", async move {
            look_again.await;
            Ok(())
        });
        let letter_log = LetterLog::default();
        let watch = Watch {
            clock: clock.clone(),
            database: database.clone(),
            metrics: metrics.clone(),
            health: health.dependency("clock"),
        };
        let watch = watch.run(process.shutdown());
        process.start("clock", async move {
            watch.await;
            Ok(())
        });
        for number in 0..ingest.writers {
            let writer = Writer::<B> {
                source: self.source,
                settings: ingest.clone(),
                queue: receiver.clone(),
                settlements: settlements.clone(),
                database: database.clone(),
                clock: clock.clone(),
                metrics: metrics.clone(),
                tracer: self.tracer.clone(),
                letter_log: letter_log.clone(),
                audit: audit.clone(),
            };
            let shutdown = process.shutdown();
            process.start(format!("writer-{number}"), async move {
                writer.run().await;
                // A source that has all it wants closes the queue itself, and the process ends when it has said goodbye.
                shutdown.cancelled().await;
                Ok(())
            });
        }
        Ok(Intake { queue: sender, settlements, metrics, database, prepared })
    }
}
