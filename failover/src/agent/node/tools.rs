//! Postgres' own programs: the postmaster, and the tools that read or rewrite a stopped node's data.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, anyhow};
use nix::unistd::geteuid;
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::{Postgres, Refusal};
use crate::agent::conf::Conf;
use crate::agent::settings::RegionAgent;
use crate::agent::shared::Shared;
use crate::agent::symptoms;
use crate::priority;
use crate::protocol::{Code, Control, Upstream};

const TOOL: Duration = Duration::from_secs(10);
/// Half a minute of failures that come at once, five of timeouts.
const READS: u32 = 30;
const READ_AGAIN: Duration = Duration::from_secs(1);

impl Postgres {
    pub(super) async fn rewind(&self, upstream: &Upstream, limit: Duration) -> Result<(), Failed> {
        let mut command = self.command("pg_rewind", "KILL");
        command.arg("--progress").arg("--target-pgdata").arg(&self.settings.data);
        command.arg("--source-server").arg(format!(
            "host={} port={} user={} dbname=postgres connect_timeout=5",
            upstream.host, upstream.port, self.settings.replication_user
        ));
        let said = self.tool("pg_rewind", command, limit).await?;
        if is_same_timeline(&said) {
            let message = format!(
                "both are on the same timeline, by which pg_rewind cannot tell their histories apart: {said}"
            );
            return Err(Failed { refusal: Refusal::new(Code::Unrewindable, message), touched: false });
        }
        Ok(())
    }

    /// Makes a copy of the upstream's data beside ours, which stays as it is.
    pub(super) async fn copy(&self, upstream: &Upstream, limit: Duration) -> Result<(), Refusal> {
        let conf = self.conf.clone();
        let copy = tokio::task::spawn_blocking(move || conf.clear_copy())
            .await
            .context("clear up an earlier copy")??;
        let mut command = self.command("pg_basebackup", "KILL");
        command.arg("--pgdata").arg(&copy);
        command.args(["--wal-method=stream", "--checkpoint=fast", "--no-password"]);
        command.arg("--slot").arg(&self.settings.node);
        command.arg("--dbname").arg(format!(
            "host={} port={} user={} connect_timeout=5",
            upstream.host, upstream.port, self.settings.replication_user
        ));
        self.tool("pg_basebackup", command, limit).await.map(drop).map_err(|failed| failed.refusal)
    }

    async fn tool(&self, name: &str, mut command: Command, limit: Duration) -> Result<String, Failed> {
        command.kill_on_drop(true);
        command.env("PGPASSFILE", self.conf.passfile());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = async {
            let child = spawn(command).await.with_context(|| format!("start {name}"))?;
            tokio::time::timeout(limit, child.wait_with_output())
                .await
                .map_err(|_| anyhow!("{name} did not end within {limit:?}"))?
                .with_context(|| format!("run {name}"))
        };
        let output = output.await.map_err(|error| Failed { refusal: error.into(), touched: true })?;
        let said = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = said.lines().flat_map(|line| line.rsplit('\r').next()).rev().take(5).collect();
        let last = last.into_iter().rev().collect::<Vec<_>>().join("; ");
        if !output.status.success() {
            let message = format!("{name} failed ({}): {last}", output.status);
            let refusal = Refusal::new(symptoms::of_tool(&said), message);
            return Err(Failed { refusal, touched: said.contains(BEGINS) });
        }
        tracing::info!(said = last, "{name} is done");
        Ok(last)
    }
}

/// `pg_rewind` says this before it changes anything.
const BEGINS: &str = "need to copy";

/// How a tool failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) refusal: Refusal,
    /// It may have changed the data.
    pub(super) touched: bool,
}

/// `pg_rewind` has compared nothing and done nothing, and calls it success.
fn is_same_timeline(said: &str) -> bool {
    said.contains("on the same timeline")
}

/// What is needed to read the control file.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    pub(super) settings: RegionAgent,
    pub(super) conf: Conf,
    pub(super) shared: Arc<Shared>,
    pub(super) half_built: bool,
}

impl Tools {
    /// What the control file says, and none when there is no data. A machine that is too busy to start a program must not
    /// look like one whose data is gone, since that is cloned: it is asked again, and given up only when it never answers.
    pub(super) async fn settled_control(&self) -> Option<Control> {
        let mut left = READS;
        loop {
            match self.control().await {
                Ok(control) => return control,
                Err(error) if left == 0 => {
                    tracing::error!(error = format!("{error:#}"), "no usable data; a clone is needed");
                    return None;
                }
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "control file not read; trying again")
                }
            }
            left -= 1;
            tokio::time::sleep(READ_AGAIN).await;
        }
    }

    pub(super) async fn control(&self) -> anyhow::Result<Option<Control>> {
        let empty = std::fs::read_dir(&self.settings.data).is_ok_and(|mut dir| dir.next().is_none());
        if self.shared.status().empty != empty {
            self.shared.change(|status| status.empty = empty);
        }
        if self.half_built || !self.settings.data.join("global/pg_control").exists() {
            return Ok(None);
        }
        let mut command = command(&self.settings, "pg_controldata", "KILL");
        command.arg("-D").arg(&self.settings.data).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = spawn(command).await.context("start pg_controldata")?;
        let output = tokio::time::timeout(TOOL, child.wait_with_output())
            .await
            .map_err(|_| anyhow!("pg_controldata did not end within {TOOL:?}"))?
            .context("run pg_controldata")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim_start_matches(':').trim().to_owned())
        };
        let value = |name: &str| field(name).with_context(|| format!("pg_controldata says no {name:?}"));
        let timeline = |name: &str| value(name)?.parse::<u32>().context("timeline of the control file");
        let system_id = value("Database system identifier")?;
        let control = Control {
            timeline: timeline("Latest checkpoint's TimeLineID")?
                // After a promotion, until its first checkpoint, only this knows.
                .max(timeline("Min recovery ending loc's timeline")?),
            checkpoint: value("Latest checkpoint location")?.parse()?,
            state: value("Database cluster state")?,
            standby: self.conf.is_standby(),
        };
        self.shared.change(|status| status.system_id = system_id);
        Ok(Some(control))
    }
}

/// A program of Postgres, as its account, that gets a signal when we end.
pub(super) fn command(settings: &RegionAgent, program: &str, on_our_death: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LC_ALL", "C.UTF-8");
    if geteuid().is_root() {
        let account = &settings.account;
        command.arg(format!("--reuid={account}")).arg(format!("--regid={account}")).arg("--init-groups");
    }
    let program: PathBuf = settings.bin.join(program);
    command.args(["--pdeathsig", on_our_death, "--"]).arg(program);
    command.stdin(Stdio::null()).current_dir("/").process_group(0).kill_on_drop(false);
    command
}

struct Job {
    command: Command,
    runtime: Handle,
    reply: oneshot::Sender<std::io::Result<Child>>,
}

/// The death signal follows the thread that started the child: one thread that lives as long as we do starts them all.
pub(super) async fn spawn(command: Command) -> anyhow::Result<Child> {
    static SPAWNER: OnceLock<Option<SyncSender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = std::sync::mpsc::sync_channel::<Job>(16);
        let thread = std::thread::Builder::new().name("spawner".into()).spawn(move || {
            priority::ordinary();
            for Job { mut command, runtime, reply } in jobs {
                let _entered = runtime.enter();
                drop(reply.send(command.spawn()));
            }
        });
        thread.ok().map(|_| sender)
    });
    let (reply, child) = oneshot::channel();
    spawner
        .as_ref()
        .context("start the thread that starts children")?
        .try_send(Job { command, runtime: Handle::current(), reply })
        .map_err(|_| anyhow!("the thread that starts children is swamped"))?;
    Ok(child.await.context("the thread that starts children is gone")??)
}
