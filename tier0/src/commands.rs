//! `tier0 status`, `down`, `logs`, `psql`, `verify`: what is done to a run from another terminal, or after it.

pub mod failover;
pub mod person;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;

use crate::home::{Home, Lock};
use crate::terminal::say;
use crate::verify::stored::{Scope, read};
use crate::verify::{Report, compare};
use crate::{up, verify};
use playground::cluster::{Cluster, Options, connection};
use playground::postgres::{Postgres, Role, connect};
use playground::process::Process;
use playground::{http, procfs, shipped};

/// An `up` that drains may have to wait for a consumer that catches up.
const DRAIN: Duration = Duration::from_secs(600);
/// A reading acknowledged just before the ledger's snapshot is committed soon after.
const SETTLE: Duration = Duration::from_secs(15);

/// What runs. Exit status 0 when everything that was started still does, 1 when not or not yet, 3 when nothing runs.
///
/// # Errors
/// When the state cannot be read.
pub async fn status(home: &Home) -> anyhow::Result<ExitCode> {
    let state = home.state()?;
    let Some(up) = state.up.filter(Process::lives) else {
        say("nothing runs (tier0 up starts it)");
        return Ok(ExitCode::from(3));
    };
    if state.processes.is_empty() {
        say(format!(
            "tier0 up (pid {}) is starting since {}, data in {}",
            up.pid,
            since(&up),
            home.data().display()
        ));
        return Ok(ExitCode::FAILURE);
    }
    say(format!("up since {}, data in {}", since(&up), home.data().display()));
    let mut good = true;
    good &= failover::show(&state.processes).await;
    // A node's postmaster changes with each failover; what it is stands above.
    let managed = state.processes.iter().any(|process| process.name == failover::ORCHESTRATOR);
    for process in state.processes.iter().filter(|process| !(managed && process.name.starts_with("region"))) {
        let (what, fine) = if process.lives() { health(process).await } else { ("ENDED".into(), false) };
        good &= fine;
        let stat = procfs::stat(process.pid);
        say(format!(
            "  {:<26}127.0.0.1:{:<7}pid {:<9}{:>5} MB  {what}",
            process.name,
            process.port,
            process.pid,
            stat.map_or(0, |stat| stat.rss_bytes / 1_000_000),
        ));
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Our own programs say more than that they run.
async fn health(process: &Process) -> (String, bool) {
    if !["consumer", "simulator", "agent-", "orchestrator"].iter().any(|part| process.name.contains(part)) {
        return ("runs".into(), true);
    }
    match http::get(process.port, "/health/ready").await {
        Ok((200, _)) => ("ready".into(), true),
        Ok((_, body)) => (format!("NOT READY {}", body.trim()), false),
        Err(error) => (format!("NO ANSWER {error:#}"), false),
    }
}

fn since(process: &Process) -> String {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime: f64 = uptime.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or_default();
    #[allow(clippy::cast_precision_loss, reason = "seconds for the eye")]
    let seconds = (uptime - process.started as f64 / 100.0).max(0.0);
    format!("{seconds:.0} s")
}

/// Ends a running `up` and waits for it.
///
/// # Errors
/// When it does not end.
pub async fn down(home: &Home, now: bool) -> anyhow::Result<ExitCode> {
    let state = home.state()?;
    let Some(up) = state.up.filter(Process::lives) else {
        say("nothing runs");
        return Ok(ExitCode::SUCCESS);
    };
    let signal = if now { Signal::SIGKILL } else { Signal::SIGTERM };
    kill(Pid::from_raw(up.pid), signal).with_context(|| format!("send {signal} to {}", up.pid))?;
    if state.processes.is_empty() {
        say("it is still starting: stopping it");
    } else if !now {
        say("draining: the verdict is printed where `tier0 up` runs");
    }
    // Its servers die with it; their data is free when they are gone.
    let deadline = Instant::now() + DRAIN;
    while up.lives() || state.processes.iter().any(Process::lives) {
        if Instant::now() > deadline {
            bail!("tier0 up (pid {}) still runs after {DRAIN:?}; tier0 down --now kills it", up.pid);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    say("down");
    Ok(ExitCode::SUCCESS)
}

/// Shows a log, of what runs or ran last.
///
/// # Errors
/// When there is no such log.
pub async fn logs(home: &Home, name: Option<&str>, follow: bool) -> anyhow::Result<ExitCode> {
    let Some(name) = name else {
        for name in log_names(home)? {
            say(name);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let path = home.data().join(format!("{name}.log"));
    if !path.is_file() {
        bail!("no log of {name}; there are: {}", log_names(home)?.join(", "));
    }
    let mut command = Command::new("tail");
    if follow {
        command.args(["-n", "50", "-F"]);
    } else {
        command.args(["-n", "+1"]);
    }
    let status = command.arg(&path).status().await.context("run tail")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn log_names(home: &Home) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(home.data()).context("read the data directory")?.flatten() {
        if let Some(name) = entry.file_name().to_str().and_then(|name| name.strip_suffix(".log")) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The nodes: those that run, or, when none does, started for as long as this lives.
enum Nodes {
    Running(Vec<(String, u16)>),
    Own(Cluster, Lock),
}

impl Nodes {
    async fn find(home: &Home) -> anyhow::Result<Self> {
        let Some(lock) = home.lock()? else {
            let state = home.state()?;
            let nodes = state.processes.iter().filter(|process| process.name.starts_with("region"));
            let nodes: Vec<_> = nodes.map(|process| (process.name.clone(), process.port)).collect();
            if nodes.is_empty() {
                bail!("tier0 up is still starting");
            }
            return Ok(Self::Running(nodes));
        };
        if !Cluster::exists(home.data()) {
            bail!("there is no data in {}: tier0 up makes some", home.data().display());
        }
        let standbys = usize::from(home.data().join("region2/PG_VERSION").is_file());
        let options = Options { standbys, sync: true, ..Options::default() };
        Ok(Self::Own(Cluster::open(home.data(), options).await?, lock))
    }

    fn list(&self) -> Vec<(String, u16)> {
        match self {
            Self::Running(nodes) => nodes.clone(),
            Self::Own(cluster, _) => {
                cluster.nodes.iter().map(|node: &Postgres| (node.name().to_owned(), node.port())).collect()
            }
        }
    }

    async fn stop(self) -> anyhow::Result<()> {
        match self {
            Self::Running(_) => Ok(()),
            Self::Own(mut cluster, _lock) => cluster.stop().await,
        }
    }
}

/// Where `psql` is to look: a node by its name, or whichever node plays the part now.
fn destination(nodes: &[(String, u16)], whom: &str) -> anyhow::Result<String> {
    let found: Vec<_> = match whom {
        "primary" | "standby" => nodes.iter().collect(),
        name => nodes.iter().filter(|(node, _)| node == name).collect(),
    };
    if found.is_empty() {
        let names: Vec<&str> = nodes.iter().map(|(name, _)| name.as_str()).collect();
        bail!("no node {whom}; there are: primary, standby, {}", names.join(", "));
    }
    let part = if matches!(whom, "primary" | "standby") { whom } else { "any" };
    let hosts = vec!["127.0.0.1"; found.len()].join(",");
    let ports: Vec<String> = found.iter().map(|(_, port)| port.to_string()).collect();
    Ok(format!("host={hosts} port={} target_session_attrs={part} connect_timeout=5", ports.join(",")))
}

/// `psql` on one node.
///
/// # Errors
/// When there is no such node.
pub async fn psql(home: &Home, whom: &str, admin: bool, args: &[String]) -> anyhow::Result<ExitCode> {
    let nodes = Nodes::find(home).await?;
    let destination = destination(&nodes.list(), whom)?;
    let role = if admin { Role::Admin } else { Role::Owner };
    let status = Command::new(shipped::postgres_bin()?.join("psql"))
        .args(["-U", role.name(), "-d"])
        .arg(format!("{destination} dbname={}", playground::postgres::DATABASE))
        .args(args)
        .env("PGPASSWORD", Cluster::passwords(home.data())?.of(role))
        .status()
        .await
        .context("run psql")?;
    nodes.stop().await?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Checks the ledger against every node.
///
/// # Errors
/// When there is no ledger or no data.
pub async fn verify(home: &Home, json: bool, file: Option<&Path>) -> anyhow::Result<ExitCode> {
    let path = file.map_or_else(|| home.ledger(), Path::to_owned);
    let ledger = up::load_ledger(&path)?;
    let of_sessions = home.session_ledger();
    // Another ledger than the last run's says nothing of sessions.
    let of_sessions = (file.is_none() && of_sessions.exists()).then_some(of_sessions);
    let of_sessions = of_sessions.map(|path| up::load_session_ledger(&path)).transpose()?;
    let nodes = Nodes::find(home).await?;
    let passwords = Cluster::passwords(home.data())?;
    let run = home.run()?;
    let scope = run.map_or(Scope::Everything, |run| Scope::Run { first_transaction: run.first_transaction });
    let retention = run.and_then(|run| run.retention);
    let deadline = Instant::now() + SETTLE;
    let report = loop {
        let (mut findings, mut sessions) = (Vec::new(), Vec::new());
        for (name, port) in nodes.list() {
            let mut db = connect(&connection(port, &passwords, Role::Owner)).await?;
            let stored = read(&mut db, &ledger, scope).await.with_context(|| format!("look into {name}"))?;
            findings.push(compare(&name, &ledger, &stored.within(retention)));
            if let Some(ledger) = &of_sessions {
                let stored = verify::sessions::read(&db, ledger).await;
                let stored = stored.with_context(|| format!("look into {name}"))?;
                sessions.push(verify::sessions::compare(&name, ledger, &stored));
            }
        }
        let report = Report::new(&ledger, findings).with_sessions(sessions);
        // While it runs, what the snapshot counts may not be committed yet, and the standby replays a little later.
        if report.holds() || Instant::now() > deadline || matches!(nodes, Nodes::Own(..)) {
            break report;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    if json {
        say(serde_json::to_string_pretty(&report).context("write the report")?);
    } else {
        say(&report);
    }
    nodes.stop().await?;
    Ok(if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
