//! The life of a process: named tasks, one shutdown signal, a bounded drain.
//!
//! The first task that ends before it was asked to ends the process. SIGTERM or SIGINT asks all tasks to drain; a
//! second one, or the end of the grace period, gives up and names the tasks that were still busy.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use axum::Router;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{Id, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::settings::{self, EXIT_CONFIG, Settings, SettingsArgs};

const HTTP_GOODBYE: Duration = Duration::from_millis(500);

/// The tasks of one process and the token that asks them to stop.
#[derive(Debug, Default)]
pub struct Process {
    tasks: JoinSet<anyhow::Result<()>>,
    names: HashMap<Id, String>,
    shutdown: CancellationToken,
    /// Run until all tasks are drained, so that metrics and health can be read to the end.
    servers: JoinSet<anyhow::Result<()>>,
    /// Begin to end when all tasks are drained, with what is left of the grace period.
    last: JoinSet<()>,
    drained: CancellationToken,
}

impl Process {
    /// Cancelled when the process should drain and end.
    #[must_use]
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Starts a task. It must end soon after [`Process::shutdown`] is cancelled, and not before.
    pub fn start(
        &mut self,
        name: impl Into<String>,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let handle = self.tasks.spawn(task);
        self.names.insert(handle.id(), name.into());
    }

    /// Serves HTTP until everything else is drained.
    pub fn serve(&mut self, listener: TcpListener, routes: Router) {
        self.servers.spawn(crate::http::serve(listener, routes, self.drained.clone()));
    }

    /// Starts something that is not needed for the process to do its work, and that tells of it to the end: the token is
    /// cancelled when all tasks are drained. What it has not done when the grace period ends is left undone.
    pub fn finish_with<F>(&mut self, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.last.spawn(task(self.drained.clone()));
    }

    /// Runs until a signal or until a task ends, then drains for at most `grace`.
    ///
    /// # Errors
    /// The error of the first task that failed, a task that ended unasked, or the names of the tasks that did not
    /// drain in time.
    pub async fn run(mut self, grace: Duration) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let mut outcome = Ok(());
        tokio::select! {
            // In this order: a task that ends because of the token must not be taken for one that ended unasked.
            biased;
            () = self.shutdown.cancelled() => {}
            _ = terminate.recv() => tracing::info!(grace = ?grace, "SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!(grace = ?grace, "SIGINT: draining"),
            Some(ended) = self.servers.join_next() => {
                outcome = Err(match ended {
                    Ok(Ok(())) => anyhow!("the HTTP server ended before the process was asked to stop"),
                    Ok(Err(error)) => error,
                    Err(error) => anyhow!(error),
                });
            }
            Some(ended) = self.tasks.join_next_with_id() => {
                let (name, result) = self.ended(ended);
                outcome = Err(match result {
                    Ok(()) => anyhow!("task {name} ended before the process was asked to stop"),
                    Err(error) => error.context(format!("task {name} failed")),
                });
            }
        }
        self.shutdown.cancel();
        let deadline = tokio::time::sleep(grace);
        tokio::pin!(deadline);
        while !self.tasks.is_empty() {
            tokio::select! {
                Some(ended) = self.tasks.join_next_with_id() => {
                    let (name, result) = self.ended(ended);
                    if let Err(error) = result {
                        outcome = outcome.and(Err(error.context(format!("task {name} failed while draining"))));
                    }
                }
                () = &mut deadline => return Err(self.stuck(&format!("{grace:?} of grace"))),
                _ = terminate.recv() => return Err(self.stuck("a second signal")),
                _ = interrupt.recv() => return Err(self.stuck("a second signal")),
            }
        }
        self.drained.cancel();
        while !self.last.is_empty() {
            tokio::select! {
                _ = self.last.join_next() => {}
                () = &mut deadline => {
                    tracing::warn!("the end of the grace period: not everything was told");
                    break;
                }
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        // A client that keeps its connection open must not keep the process: what is under way gets a moment.
        if timeout(HTTP_GOODBYE, self.servers.join_all()).await.is_err() {
            tracing::debug!("an HTTP connection was still open at the end");
        }
        outcome
    }

    fn ended(
        &mut self,
        ended: Result<(Id, anyhow::Result<()>), tokio::task::JoinError>,
    ) -> (String, anyhow::Result<()>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, result),
            Err(error) => (error.id(), Err(anyhow!(error))),
        };
        (self.names.remove(&id).unwrap_or_else(|| "unnamed".into()), result)
    }

    fn stuck(&self, after: &str) -> anyhow::Error {
        let names: BTreeMap<&str, ()> = self.names.values().map(|name| (name.as_str(), ())).collect();
        anyhow!("not drained after {after}; still busy: {}", names.into_keys().collect::<Vec<_>>().join(", "))
    }
}

/// The frame of every `main`: settings, logs, then `run` on a multi-threaded runtime; exit status 78 for bad
/// settings, 1 for a failure.
pub fn main<T, F>(
    args: &SettingsArgs,
    logs: impl FnOnce(&T) -> &crate::logs::LogSettings,
    run: impl FnOnce(T) -> F,
) -> ExitCode
where
    T: Settings,
    F: Future<Output = anyhow::Result<()>>,
{
    let settings: T = match settings::load(args, std::env::vars().collect()) {
        Ok(settings) => settings,
        Err(error) => return fail(&error.to_string(), EXIT_CONFIG),
    };
    if args.print_config {
        return match settings::print(&settings) {
            Ok(text) => {
                show(&text);
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error.to_string(), EXIT_CONFIG),
        };
    }
    crate::logs::init(logs(&settings));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("start the runtime: {error}"), 1),
    };
    match runtime.block_on(run(settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the process ends");
            ExitCode::FAILURE
        }
    }
}

#[allow(clippy::print_stdout, reason = "--print-config is asked for on standard output")]
fn show(text: &str) {
    println!("{text}");
}

#[allow(clippy::print_stderr, reason = "logs are not up yet when settings are wrong")]
fn fail(message: &str, status: u8) -> ExitCode {
    eprintln!("{message}");
    ExitCode::from(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_unexpected_end_stops_the_others_and_is_named() {
        let mut process = Process::default();
        let shutdown = process.shutdown();
        process.start("patient", async move {
            shutdown.cancelled().await;
            Ok(())
        });
        process.start("short", async { Ok(()) });
        let error = process.run(Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("task short ended"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_drain_is_named() {
        let mut process = Process::default();
        process.start("stuck", std::future::pending());
        process.shutdown().cancel();
        let error = process.run(Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("still busy: stuck"), "{error}");
    }

    #[tokio::test]
    async fn a_task_may_end_the_process_and_itself_at_once() {
        for _ in 0..100 {
            let mut process = Process::default();
            let shutdown = process.shutdown();
            process.start("end", async move {
                shutdown.cancel();
                Ok(())
            });
            tokio::task::yield_now().await;
            process.run(Duration::from_secs(5)).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_last_begins_to_end_after_the_tasks_and_has_the_rest_of_the_grace_period() {
        let (told, tells) = std::sync::mpsc::sync_channel(2);
        let mut process = Process::default();
        let (shutdown, telling) = (process.shutdown(), told.clone());
        process.start("worker", async move {
            shutdown.cancelled().await;
            tokio::time::sleep(Duration::from_secs(3)).await;
            telling.send("worker").context("tell")
        });
        process.finish_with(|drained| async move {
            drained.cancelled().await;
            told.send("last").unwrap();
            std::future::pending::<()>().await;
        });
        process.shutdown().cancel();
        let begun = tokio::time::Instant::now();
        process.run(Duration::from_secs(5)).await.unwrap();
        assert_eq!(tells.try_iter().collect::<Vec<_>>(), ["worker", "last"]);
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
    }

    #[tokio::test]
    async fn a_drained_process_ends_well() {
        let mut process = Process::default();
        let shutdown = process.shutdown();
        process.start("worker", async move {
            shutdown.cancelled().await;
            Ok(())
        });
        process.shutdown().cancel();
        process.run(Duration::from_secs(5)).await.unwrap();
    }
}
