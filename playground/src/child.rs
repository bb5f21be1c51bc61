//! A process that we started and that never outlives us.
//!
//! The kernel ends it when we die (`setpriv --pdeathsig KILL`), so that not even `kill -9` of the parent leaves a
//! server behind. That signal follows the *thread* that started the child; therefore one thread that lives as long as
//! the process starts them all. And it is cleared when a process changes its user; therefore `setpriv` changes the
//! user first and no server does it itself.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::account::Account;
use crate::procfs;

/// How often a condition of another process is looked at while we wait for it.
pub const POLL: Duration = Duration::from_millis(10);
/// How long the kernel gets to end a killed process, which may be waiting for a busy disk.
const REAP: Duration = Duration::from_secs(60);

/// How to start a process.
#[derive(Debug, Clone)]
pub struct Start {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    inherit: bool,
    account: Option<Account>,
    log: PathBuf,
}

/// Which processes a signal reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The process and all below it, as if the machine had failed or frozen.
    Tree,
    /// The process alone: a postmaster without its backends.
    Parent,
}

impl Start {
    /// `name` appears in messages; standard output and error are appended to `log`.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            environment: Vec::new(),
            inherit: false,
            account: None,
            log: log.into(),
        }
    }

    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Passes our own environment on. Servers do not get it (`PGDATA`, `PGPORT` and the like would change them).
    #[must_use]
    pub fn inherit_environment(mut self) -> Self {
        self.inherit = true;
        self
    }

    #[must_use]
    pub fn account(mut self, account: Option<Account>) -> Self {
        self.account = account;
        self
    }

    /// Starts it and returns at once.
    ///
    /// # Errors
    /// When the program or the log file cannot be opened.
    pub async fn spawn(self) -> anyhow::Result<Child> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("open the log {}", self.log.display()))?;
        let mut command = self.command()?;
        command.stdout(log.try_clone().context("open the log twice")?).stderr(log);
        let child = spawn(command).await.with_context(|| format!("start {}", self.name))?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).context("a new process has a pid")?;
        Ok(Child { name: self.name, log: self.log, pid: Pid::from_raw(pid), child, ended: None })
    }

    /// Runs a tool to its end.
    ///
    /// # Errors
    /// When it fails or takes too long; the message holds the end of what it wrote.
    pub async fn run(self, limit: Duration) -> anyhow::Result<()> {
        let mut child = self.spawn().await?;
        match tokio::time::timeout(limit, child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => bail!("{} failed ({status}){}", child.name, child.tail()),
            Ok(Err(error)) => Err(error),
            Err(_) => bail!("{} did not end within {limit:?}{}", child.name, child.tail()),
        }
    }

    fn command(&self) -> anyhow::Result<Command> {
        if !self.program.is_file() {
            bail!("{}: {} is missing", self.name, self.program.display());
        }
        let mut command = Command::new("setpriv");
        if !self.inherit {
            command
                .env_clear()
                .env("PATH", std::env::var_os("PATH").unwrap_or_default())
                .env("LC_ALL", "C.UTF-8");
        }
        if let Some(account) = &self.account {
            command.arg(format!("--reuid={}", account.name)).arg(format!("--regid={}", account.name));
            command.arg("--init-groups");
        }
        command.args(["--pdeathsig", "KILL", "--"]).arg(&self.program).args(&self.args);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        // A group of its own, so that Ctrl-C in the terminal reaches us and we decide in which order things end.
        command.stdin(Stdio::null()).current_dir("/").process_group(0).kill_on_drop(true);
        Ok(command)
    }
}

struct Job {
    command: Command,
    runtime: Handle,
    reply: oneshot::Sender<std::io::Result<tokio::process::Child>>,
}

/// Hands the command to the one thread that starts all children.
async fn spawn(command: Command) -> anyhow::Result<tokio::process::Child> {
    static SPAWNER: OnceLock<Option<SyncSender<Job>>> = OnceLock::new();
    let spawner = SPAWNER
        .get_or_init(|| {
            let (sender, jobs) = std::sync::mpsc::sync_channel::<Job>(64);
            let started = std::thread::Builder::new().name("spawner".into()).spawn(move || {
                raise_file_limit();
                for Job { mut command, runtime, reply } in jobs {
                    let _entered = runtime.enter();
                    // When nobody waits for it any more, the child is dropped here and thereby killed.
                    drop(reply.send(command.spawn()));
                }
            });
            started.ok().map(|_| sender)
        })
        .as_ref()
        .context("start the thread that starts children")?;
    let (reply, child) = oneshot::channel();
    spawner
        .try_send(Job { command, runtime: Handle::current(), reply })
        .map_err(|_| anyhow!("the thread that starts children is gone or swamped"))?;
    Ok(child.await.context("the thread that starts children is gone")??)
}

/// A broker with one connection per device needs every file the machine allows; the usual soft limit is 1024.
fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "cannot raise the limit of open files");
    }
}

/// A running process. Dropping it kills it and all below it, and waits until they are gone.
#[derive(Debug)]
pub struct Child {
    name: String,
    log: PathBuf,
    pid: Pid,
    child: tokio::process::Child,
    ended: Option<ExitStatus>,
}

impl Child {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// # Errors
    /// When the kernel does not tell.
    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let status = self.child.wait().await.with_context(|| format!("wait for {}", self.name))?;
        self.ended = Some(status);
        Ok(status)
    }

    /// # Errors
    /// When it no longer runs.
    pub fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        if let Some(status) = self.ended() {
            bail!("{} has ended ({status}){}", self.name, self.tail());
        }
        kill(self.pid, signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// Asks it to end and waits. A stopped process is woken first.
    ///
    /// # Errors
    /// When it does not end in time: then it is killed, with all below it.
    pub async fn stop(&mut self, signal: Signal, grace: Duration) -> anyhow::Result<ExitStatus> {
        if let Some(status) = self.ended() {
            return Ok(status);
        }
        self.resume();
        self.signal(signal)?;
        match tokio::time::timeout(grace, self.wait()).await {
            Ok(status) => status,
            Err(_) => {
                let tail = self.tail();
                self.kill9(Reach::Tree).await?;
                bail!("{} did not end within {grace:?} of {signal} and was killed{tail}", self.name)
            }
        }
    }

    /// SIGKILL. Returns when the process *and all below it* are gone: a postmaster's children see its death and end.
    ///
    /// # Errors
    /// When something is still there after a minute.
    pub async fn kill9(&mut self, reach: Reach) -> anyhow::Result<()> {
        if self.ended().is_some() {
            return Ok(());
        }
        let below = procfs::descendants(self.pid());
        kill_all(self.pid, &below, reach);
        self.wait().await?;
        let deadline = Instant::now() + REAP;
        while let Some(pid) = below.iter().find(|pid| procfs::lives(**pid)) {
            if Instant::now() > deadline {
                bail!("process {pid} of {} still runs {REAP:?} after SIGKILL", self.name);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// As [`Child::stop`] for a destructor: does not suspend, and leaves what does not end to the destructor's SIGKILL.
    pub(crate) fn stop_blocking(&mut self, signal: Signal, grace: Duration) {
        self.resume();
        if self.signal(signal).is_ok() {
            let deadline = Instant::now() + grace;
            while self.ended().is_none() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// SIGSTOP: it keeps its sockets and answers nothing.
    pub fn pause(&mut self, reach: Reach) {
        if self.ended().is_none() {
            send(self.pid, Signal::SIGSTOP);
            if reach == Reach::Tree {
                procfs::descendants(self.pid())
                    .into_iter()
                    .for_each(|pid| send(Pid::from_raw(pid), Signal::SIGSTOP));
            }
        }
    }

    /// SIGCONT for it and all below it.
    pub fn resume(&mut self) {
        if self.ended().is_none() {
            procfs::descendants(self.pid())
                .into_iter()
                .for_each(|pid| send(Pid::from_raw(pid), Signal::SIGCONT));
            send(self.pid, Signal::SIGCONT);
        }
    }

    /// Tries `check` until it succeeds.
    ///
    /// # Errors
    /// When the process ends before, or after `limit`; the message holds the last error and the end of the log.
    pub async fn until<T, F: Future<Output = anyhow::Result<T>>>(
        &mut self,
        what: &str,
        limit: Duration,
        mut check: impl FnMut() -> F,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match tokio::time::timeout(left, check()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error,
                Err(_) => anyhow!("no answer"),
            };
            if let Some(status) = self.ended() {
                bail!("{} ended ({status}) before {what}{}", self.name, self.tail());
            }
            if Instant::now() >= deadline {
                let tail = self.tail();
                return Err(error.context(format!("{}: {what}: not within {limit:?}{tail}", self.name)));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The end of the log, for error messages: a line that names the file, then its last lines.
    #[must_use]
    pub fn tail(&self) -> String {
        tail(&self.log, 20)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended().is_some() {
            return;
        }
        let below = procfs::descendants(self.pid());
        kill_all(self.pid, &below, Reach::Tree);
        let deadline = Instant::now() + Duration::from_secs(3);
        while (self.ended().is_none()
            || killpg(self.pid, None).is_ok()
            || below.iter().any(|pid| procfs::lives(*pid)))
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The parent first: a postmaster that sees a child die would start recovery.
fn kill_all(parent: Pid, below: &[i32], reach: Reach) {
    if reach == Reach::Tree {
        // Its group at one stroke: what a shell of initdb starts in this moment is in no list, and would go on writing.
        if let Err(error) = killpg(parent, Signal::SIGKILL) {
            tracing::debug!(%parent, %error, "no group to kill");
        }
    }
    send(parent, Signal::SIGKILL);
    if reach == Reach::Tree {
        below.iter().for_each(|pid| send(Pid::from_raw(*pid), Signal::SIGKILL));
    }
}

/// A process that is already gone needs no signal.
fn send(pid: Pid, signal: Signal) {
    if let Err(error) = kill(pid, signal) {
        tracing::debug!(%pid, %signal, %error, "signal not sent");
    }
}

/// The last `lines` lines of a log with its name in front; starts with a newline, ready to be appended.
#[must_use]
pub fn tail(log: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    let last = all.get(all.len().saturating_sub(lines)..).unwrap_or_default();
    if last.is_empty() {
        return format!("\n  {} is empty", log.display());
    }
    format!("\n  end of {}:\n    {}", log.display(), last.join("\n    "))
}
