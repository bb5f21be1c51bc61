//! Wiring of a run: connect, publish, connect again; the ledger; the end.

use std::time::{Duration, Instant};

use amqp::AmqpError;
use anyhow::{Context, bail};
use futures_util::FutureExt;
use service::backoff::Backoff;
use service::health::{Dependency, Health};
use service::http;
use service::process::Process;
use tokio_util::sync::CancellationToken;

use super::books::Summary;
use super::metrics::Metrics;
use super::publisher::{End, Publisher};
use super::settings::UserSimulatorSettings;
use crate::ledger_file;

const FIRST_WAIT: Duration = Duration::from_millis(50);
const NAME: &str = "tier0 user-simulator";
/// After the grace period: for farewells and for tasks to end.
const AFTER_GRACE: Duration = Duration::from_secs(5);

/// Runs the simulator until a signal, `run_for` or `count`; the ledger and the summary are written in any case.
///
/// # Errors
/// When it cannot start, the queue does not fit the settings, or the ledger cannot be written.
pub async fn run(settings: UserSimulatorSettings) -> anyhow::Result<()> {
    let registry = http::registry()?;
    let metrics = Metrics::new(&registry).context("register metrics")?;
    let health = Health::default();
    let broker = health.dependency("rabbitmq");
    let listener = http::bind(&settings.http).await?;
    let grace = settings.user_simulator.grace;
    let mut process = Process::default();
    process.serve(listener, http::routes(registry, health));
    let shutdown = process.shutdown();
    let run = Run {
        publisher: Publisher::new(settings.clone(), metrics.clone()),
        settings,
        metrics,
        broker,
        started: Instant::now(),
    };
    process.start("publisher", run.run(shutdown));
    process.run(grace + AFTER_GRACE).await
}

struct Run {
    publisher: Publisher,
    settings: UserSimulatorSettings,
    metrics: Metrics,
    broker: Dependency,
    started: Instant,
}

impl Run {
    async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let users = self.settings.user_simulator.clone();
        // A ledger that cannot be written is an error now, and an old one is not taken for this run's.
        self.write_ledger(false)?;
        tracing::info!(
            users = users.users,
            rate = users.messages_per_second().map_or("max".to_owned(), |rate| format!("{rate:.1}/s")),
            seed = users.seed,
            queue = self.settings.rabbitmq.queue,
            "the users come"
        );
        let outcome = self.publish(&shutdown).await;
        let written = self.write_ledger(true);
        shutdown.cancel();
        outcome.and(written)
    }

    async fn publish(&mut self, shutdown: &CancellationToken) -> anyhow::Result<()> {
        let users = self.settings.user_simulator.clone();
        let mut backoff = Backoff::new(FIRST_WAIT, users.max_backoff);
        let mut begun = None;
        loop {
            let error = match self.connect().await {
                Ok(connection) => {
                    backoff.reset();
                    self.broker.up();
                    let begun = *begun.get_or_insert_with(Instant::now);
                    let end = self.serve(&connection, begun, shutdown).await;
                    let goodbye = connection.close(200, "OK".into());
                    if tokio::time::timeout(Duration::from_secs(1), goodbye).await.is_err() {
                        tracing::debug!("goodbye not answered in time");
                    }
                    match end? {
                        None => return Ok(()),
                        Some(error) => error,
                    }
                }
                Err(AmqpError::Settings(problem)) => bail!(problem),
                Err(error) => error,
            };
            self.metrics.reconnects.inc();
            self.broker.down(error.to_string());
            if shutdown.is_cancelled() {
                tracing::warn!(%error, "ending without the broker");
                return Ok(());
            }
            let wait = backoff.next(rand::random());
            tracing::warn!(%error, again_in = ?wait, "no connection to the broker");
            tokio::time::timeout(wait, shutdown.cancelled()).map(drop).await;
        }
    }

    async fn connect(&self) -> Result<lapin::Connection, AmqpError> {
        let broker = &self.settings.rabbitmq;
        let connection = amqp::connect(broker, NAME).await?;
        // A queue that is there is used as it is: its arguments are its consumer's business.
        if !amqp::exists(&connection, broker).await? {
            amqp::declare(&connection, broker).await?;
        }
        Ok(connection)
    }

    /// Publishes on one connection. `None`: the run is over.
    async fn serve(
        &mut self,
        connection: &lapin::Connection,
        begun: Instant,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Option<AmqpError>> {
        let users = self.settings.user_simulator.clone();
        let ending = shutdown.child_token();
        let stop = ending.clone();
        let run_for = users.run_for;
        let timer = async move {
            match run_for {
                Some(run_for) => tokio::time::sleep_until((begun + run_for).into()).await,
                None => std::future::pending().await,
            }
            stop.cancel();
            std::future::pending::<()>().await;
        };
        let end = tokio::select! {
            end = self.publisher.serve(connection, &ending, users.grace) => end,
            () = timer => return Ok(None),
        };
        match end {
            End::Done => Ok(None),
            End::Failed(error) => Ok(Some(error)),
        }
    }

    fn write_ledger(&self, complete: bool) -> anyhow::Result<()> {
        let users = &self.settings.user_simulator;
        let ledger = self.publisher.ledger(complete);
        let written = users.ledger.as_ref().map_or(Ok(()), |path| ledger_file::replace(path, &ledger));
        if complete {
            let seconds = self.started.elapsed().as_secs_f64();
            let summary = Summary {
                users: users.users,
                seed: users.seed,
                seconds,
                confirmed: ledger.confirmed,
                rate_per_s: ledger.confirmed as f64 / seconds.max(0.001),
                repeated: ledger.repeated,
                resent: self.metrics.resent.get(),
                skipped: self.metrics.skipped.get(),
                unconfirmed: self.publisher.unconfirmed(),
                sessions: ledger.sessions.len(),
                site_reports: ledger.site_reports,
                dead_letters: ledger.dead_letters,
            };
            if let Some(path) = &users.summary {
                ledger_file::replace(path, &summary)?;
            }
            show(&summary);
        }
        written
    }
}

#[allow(clippy::print_stdout, reason = "the result of the command line tool")]
fn show(summary: &Summary) {
    println!(
        "{} messages confirmed in {:.1} s ({:.0}/s): {} sessions, {} site reports, {} repeated, {} unconfirmed",
        summary.confirmed,
        summary.seconds,
        summary.rate_per_s,
        summary.sessions,
        summary.site_reports,
        summary.repeated,
        summary.unconfirmed
    );
}
