//! One of our own programs as a child, talked to through its `/metrics` and `/health/ready`.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;

use crate::child::{Child, Reach, Start};
use crate::metrics::Metrics;
use crate::port::Port;
use crate::{http, shipped};

/// What is asked of a process that runs is answered at once, but on a busy machine.
const ANSWER: Duration = Duration::from_secs(20);

/// How to start a program; [`Launch::start`] does.
#[derive(Debug, Clone)]
pub struct Launch {
    name: String,
    program: String,
    environment: Vec<(String, String)>,
    args: Vec<String>,
}

impl Launch {
    /// A program by the name of its binary, for instance `mqtt-consumer`.
    #[must_use]
    pub fn new(program: &str) -> Self {
        Self { name: program.into(), program: program.into(), environment: Vec::new(), args: Vec::new() }
    }

    /// Another name for its log file and messages, when the same program runs twice.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Settings as environment variables, for instance those of `Cluster::environment`.
    #[must_use]
    pub fn envs(mut self, environment: impl IntoIterator<Item = (String, String)>) -> Self {
        self.environment.extend(environment);
        self
    }

    /// One setting: `.set("ingest.max_rows", 500)`.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        let name = format!("TIER0__{}", key.replace('.', "__").to_uppercase());
        self.environment.push((name, value.to_string()));
        self
    }

    #[must_use]
    pub fn args<T: Into<String>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts it with its log in `dir/NAME.log` and its HTTP server on a free port. Does not wait for it to be
    /// ready: [`Program::ready`] does.
    ///
    /// # Errors
    /// When it is not built.
    pub async fn start(self, dir: &Path) -> anyhow::Result<Program> {
        self.start_on(dir, Port::free()?).await
    }

    /// As [`Launch::start`], on a given port.
    ///
    /// # Errors
    /// When it is not built.
    pub async fn start_on(self, dir: &Path, port: Port) -> anyhow::Result<Program> {
        let log = dir.join(format!("{}.log", self.name));
        let mut program = Program { launch: self, log, port, child: None };
        program.spawn().await?;
        Ok(program)
    }
}

/// A program of ours, running or not. Dropping it kills it.
#[derive(Debug)]
pub struct Program {
    launch: Launch,
    log: PathBuf,
    port: Port,
    child: Option<Child>,
}

impl Program {
    /// Starts it again, with the same settings on the same port, after it ended.
    ///
    /// # Errors
    /// When it still runs or is not built.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            bail!("{} still runs", self.launch.name);
        }
        self.spawn().await
    }

    async fn spawn(&mut self) -> anyhow::Result<()> {
        let launch = &self.launch;
        let start =
            Start::new(&launch.name, shipped::program(&launch.program)?, &self.log).inherit_environment();
        let start = match shipped::config_path("tier0.toml") {
            Ok(file) => {
                let file =
                    std::fs::canonicalize(&file).with_context(|| format!("find {}", file.display()))?;
                start.args([std::ffi::OsStr::new("--config"), file.as_os_str()])
            }
            Err(_) => start,
        };
        let start = start.env("TIER0__HTTP__PORT", self.port.number().to_string());
        let start = launch.environment.iter().fold(start, |start, (name, value)| start.env(name, value));
        self.child = Some(start.args(&launch.args).spawn().await?);
        Ok(())
    }

    /// Waits until `/health/ready` says yes.
    ///
    /// # Errors
    /// When it ends before, or after `limit`; the message holds what was failing and the end of its log.
    pub async fn ready(&mut self, limit: Duration) -> anyhow::Result<()> {
        let port = self.port.number();
        self.child()?
            .until("is ready", limit, || async {
                match http::get(port, "/health/ready").await? {
                    (200, _) => Ok(()),
                    (status, body) => bail!("{status}: {}", body.trim()),
                }
            })
            .await
    }

    /// What it exports now.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn metrics(&self) -> anyhow::Result<Metrics> {
        match http::get_within(self.port.number(), "/metrics", ANSWER).await? {
            (200, body) => Metrics::parse(&body).with_context(|| format!("metrics of {}", self.launch.name)),
            (status, body) => bail!("metrics of {}: {status}: {}", self.launch.name, body.trim()),
        }
    }

    /// SIGTERM, then its own drain.
    ///
    /// # Errors
    /// When it does not end within `grace` or ends with a failure.
    pub async fn terminate(&mut self, grace: Duration) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let status = child.stop(Signal::SIGTERM, grace).await?;
        if !status.success() {
            bail!("{} ended with {status}{}", self.launch.name, child.tail());
        }
        Ok(())
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub async fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let child = self.child()?;
        match tokio::time::timeout(limit, child.wait()).await {
            Ok(status) => status,
            Err(_) => bail!("{} still runs after {limit:?}{}", child.name(), child.tail()),
        }
    }

    /// # Errors
    /// When the process stays.
    pub async fn kill9(&mut self) -> anyhow::Result<()> {
        match self.child.take() {
            Some(mut child) => child.kill9(Reach::Tree).await,
            None => Ok(()),
        }
    }

    pub fn pause(&mut self) {
        if let Some(child) = &mut self.child {
            child.pause(Reach::Tree);
        }
    }

    pub fn resume(&mut self) {
        if let Some(child) = &mut self.child {
            child.resume();
        }
    }

    /// How it ended, when it ended without being asked to.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(Child::ended)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.ended().is_none())
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.launch.name
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// `None` when it was not started or was stopped.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(Child::pid)
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    fn child(&mut self) -> anyhow::Result<&mut Child> {
        self.child.as_mut().with_context(|| format!("{} does not run", self.launch.name))
    }
}
