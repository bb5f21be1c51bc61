//! Wiring of a run: connections, the watch over them, the ledger, the end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use service::health::Health;
use service::http;
use service::metrics::Registry;
use service::process::Process;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::metrics::Metrics;
use super::publisher::{Publisher, Traffic};
use super::report::{Books, Summary};
use super::settings::DeviceSimulatorSettings;
use super::shared::{Publishers, Shared};
use super::watch;
use crate::ledger_file;

/// Files a process has open besides its MQTT connections: logs, listener, scrapes, the ledger.
const OTHER_FILES: u64 = 64;
/// After the grace period: for farewells and for tasks to end.
const AFTER_GRACE: Duration = Duration::from_secs(5);

/// Runs the simulator until a signal, `run_for` or `count`; the ledger and the summary are written in any case.
///
/// # Errors
/// When it cannot start, a task fails, or the ledger cannot be written.
pub async fn run(mut settings: DeviceSimulatorSettings) -> anyhow::Result<()> {
    let fleet = &mut settings.device_simulator;
    fleet.connections = fleet.connections.min(fleet.devices);
    let fleet = Arc::new(settings.device_simulator.clone());
    check_open_files(fleet.connections)?;
    let registry = Registry::new();
    let metrics = Metrics::new(&registry).context("register metrics")?;
    let health = Health::default();
    let broker = health.dependency("mqtt");
    let listener = http::bind(&settings.http).await?;
    let shared = Arc::new(Shared::new(settings, metrics.clone()));
    let publishers: Publishers = Arc::new(
        (0..fleet.connections)
            .map(|number| Arc::new(Mutex::new(Publisher::new(Arc::clone(&fleet), number, metrics.clone()))))
            .collect(),
    );
    // A ledger that cannot be written is an error now, and an old one is not taken for this run's.
    conclude(&shared, &publishers, false)?;
    tracing::info!(
        devices = fleet.devices,
        connections = fleet.connections,
        rate = fleet.messages_per_second().map_or("max".to_owned(), |rate| format!("{rate:.1}/s")),
        qos = fleet.qos,
        seed = fleet.seed,
        broker = format!("{}:{}", shared.settings.mqtt.host, shared.settings.mqtt.port),
        "the fleet starts"
    );

    let mut process = Process::default();
    let shutdown = process.shutdown();
    for (number, publisher) in (0..).zip(publishers.iter()) {
        let client_id = format!("{}-{:08x}-{number}", fleet.client_id, shared.run >> 32);
        let connection =
            Connection::new(number, client_id, Arc::clone(publisher), Arc::clone(&shared), shutdown.clone());
        process.start(format!("connection {number}"), connection.run());
    }
    process
        .start("watch", watch::run(Arc::clone(&shared), Arc::clone(&publishers), broker, shutdown.clone()));
    process.start("ledger", write_ledgers(Arc::clone(&shared), Arc::clone(&publishers), shutdown.clone()));
    process.start("http", http::serve(listener, http::routes(registry, health), shutdown.clone()));
    process.start("end", end(Arc::clone(&shared), shutdown));
    let outcome = process.run(fleet.grace + AFTER_GRACE).await;
    let written = tokio::task::spawn_blocking(move || conclude(&shared, &publishers, true))
        .await
        .context("write the ledger")?;
    outcome.and(written)
}

/// Ends the run when `run_for` or `count` is reached.
async fn end(shared: Arc<Shared>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let run_for = shared.settings.device_simulator.run_for;
    let elapsed = async {
        match run_for {
            Some(run_for) => {
                shared.begun.cancelled().await;
                tokio::time::sleep(run_for).await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = elapsed => tracing::info!(?run_for, "the time is up"),
        () = shared.finished.cancelled() => tracing::info!("all messages are sent"),
        () = shutdown.cancelled() => {}
    }
    shutdown.cancel();
    Ok(())
}

/// Writes the ledger in mid-run, so that a killed simulator leaves a recent one.
async fn write_ledgers(
    shared: Arc<Shared>,
    publishers: Publishers,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    if shared.settings.device_simulator.ledger.is_none() {
        shutdown.cancelled().await;
        return Ok(());
    }
    let every = shared.settings.device_simulator.ledger_every;
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let (shared, publishers) = (Arc::clone(&shared), Arc::clone(&publishers));
        let written = tokio::task::spawn_blocking(move || conclude(&shared, &publishers, false)).await;
        // A full disk now need not be one at the end; the run goes on.
        if let Err(error) = written.context("write the ledger").flatten() {
            tracing::error!(error = format!("{error:#}"), "the ledger was not written");
        }
    }
}

/// Writes the ledger; at the end also the summary.
fn conclude(shared: &Shared, publishers: &Publishers, complete: bool) -> anyhow::Result<()> {
    let fleet = &shared.settings.device_simulator;
    let mut traffic: Vec<Traffic> = Vec::with_capacity(publishers.len());
    let mut connections = Vec::with_capacity(publishers.len());
    for publisher in publishers.iter() {
        let publisher = publisher.lock().unwrap_or_else(PoisonError::into_inner);
        connections.push(publisher.snapshot());
        traffic.push(publisher.traffic().clone());
    }
    let books = Books {
        seed: fleet.seed,
        qos: fleet.qos,
        complete,
        started_us: shared.started_us,
        ended_us: shared.now().wall_us,
        connections,
        traffic,
    };
    let written = fleet.ledger.as_ref().map_or(Ok(()), |path| ledger_file::replace(path, &books));
    if complete {
        let summary = Summary::new(fleet, &books, shared.metrics.reconnects.get());
        if let Some(path) = &fleet.summary {
            ledger_file::replace(path, &summary)?;
        }
        show(&summary.line());
    }
    written
}

#[allow(clippy::print_stdout, reason = "the result of the command line tool")]
fn show(line: &str) {
    println!("{line}");
}

/// Every connection is an open file. Raises the soft limit as far as it may.
fn check_open_files(connections: u32) -> anyhow::Result<()> {
    let needed = u64::from(connections) + OTHER_FILES;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
    if needed <= soft {
        return Ok(());
    }
    if needed > hard {
        bail!(
            "device_simulator.connections = {connections} needs {needed} open files, the limit is {hard}: \
             raise it (ulimit -n, LimitNOFILE) or use fewer connections"
        );
    }
    setrlimit(Resource::RLIMIT_NOFILE, needed, hard).context("raise the limit of open files")
}
