//! Prometheus and the exporters it needs, as children with their data in the playground.
//!
//! What is watched is said with [`Monitoring::watch`], again whenever something came up; Prometheus reads the list within
//! seconds. Everything else is `config/prometheus/` as it is shipped. Runs as user `prometheus` when we are root.

mod exporters;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;

use crate::account::{Account, private_dir, private_file};
use crate::child::{Child, Start};
use crate::port::Port;
use crate::process::Process;
use crate::program::Program;
use crate::{http, shipped};
pub use exporters::Servers;

/// Replaying the log of an earlier run takes a while.
const READY: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(30);

/// Something to scrape: the job, the instance, the port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    job: String,
    instance: String,
    port: u16,
    /// Further labels, such as `__param_target`.
    labels: Vec<(&'static str, String)>,
}

impl Target {
    #[must_use]
    pub fn new(job: &str, instance: &str, port: u16) -> Self {
        Self { job: job.into(), instance: instance.into(), port, labels: Vec::new() }
    }

    /// One of our programs. An agent is known by its region, the others by their own names.
    #[must_use]
    pub fn of(program: &Program) -> Self {
        match program.name().strip_prefix("agent-") {
            Some(region) => Self::new("region-agent", region, program.port()),
            None => Self::new(program.name(), program.name(), program.port()),
        }
    }

    fn label(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.labels.push((name, value.into()));
        self
    }
}

/// What is running. Dropping it kills it.
#[derive(Debug)]
pub struct Monitoring {
    dir: PathBuf,
    account: Option<Account>,
    prometheus: Running,
    exporters: Vec<Running>,
    /// Targets of the exporters, and RabbitMQ's own.
    servers: Vec<Target>,
    rabbitmq: Option<u16>,
}

/// A child and the port it serves.
#[derive(Debug)]
struct Running {
    child: Child,
    port: Port,
}

impl Monitoring {
    /// Starts Prometheus with its data in `dir/prometheus`, and an exporter for each of `servers`; `near` are the ports
    /// wanted for Prometheus and for the first exporters.
    ///
    /// # Errors
    /// When a package is missing or something does not come up; the message holds the end of its log.
    pub async fn start(parent: &Path, port: Port, servers: &Servers) -> anyhow::Result<Self> {
        let account = Account::of_server("prometheus")?;
        let dir = parent.join("prometheus");
        for dir in [&dir, &dir.join("data"), &dir.join("rules"), &dir.join("targets")] {
            private_dir(dir, account.as_ref())?;
        }
        let config = shipped::config_path("prometheus/prometheus.yml")?;
        copy(&config, &dir.join("prometheus.yml"), account.as_ref())?;
        let rules = config.parent().context("a file has a directory")?.join("rules");
        for entry in std::fs::read_dir(&rules).with_context(|| format!("read {}", rules.display()))? {
            let entry = entry.with_context(|| format!("read {}", rules.display()))?;
            copy(&entry.path(), &dir.join("rules").join(entry.file_name()), account.as_ref())?;
        }
        let (exporters, targets) = exporters::start(parent, &dir, account.as_ref(), servers).await?;
        let prometheus = start_prometheus(parent, &dir, port, account.clone()).await?;
        let number = prometheus.port.number();
        let mut monitoring = Self { dir, account, prometheus, exporters, servers: targets, rabbitmq: None };
        monitoring.servers.push(Target::new("prometheus", "prometheus", number));
        monitoring.watch(&[], None)?;
        Ok(monitoring)
    }

    /// Our processes and, if it is up, RabbitMQ's own metrics port; what was said before is forgotten.
    ///
    /// # Errors
    /// When the list cannot be written.
    pub fn watch(&mut self, processes: &[Target], rabbitmq: Option<u16>) -> anyhow::Result<()> {
        self.rabbitmq = rabbitmq;
        let broker: Vec<Target> =
            rabbitmq.map(|port| Target::new("", "rabbitmq", port)).into_iter().collect();
        for (name, targets) in [("processes", processes), ("servers", &self.servers), ("rabbitmq", &broker)] {
            // Prometheus must never read half a list.
            let file = self.dir.join("targets").join(format!("{name}.yml"));
            let new = file.with_extension("new");
            private_file(&new, &list(targets), self.account.as_ref())?;
            std::fs::rename(&new, &file).with_context(|| format!("replace {}", file.display()))?;
        }
        Ok(())
    }

    /// Where Prometheus answers.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.prometheus.port.number()
    }

    /// What ended unasked, with the end of its log.
    pub fn died(&mut self) -> Option<String> {
        let mut all = std::iter::once(&mut self.prometheus).chain(&mut self.exporters);
        all.find_map(|running| {
            let status = running.child.ended()?;
            Some(format!("{} ended by itself ({status}){}", running.child.name(), running.child.tail()))
        })
    }

    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        std::iter::once(&self.prometheus)
            .chain(&self.exporters)
            .map(|Running { child, port }| {
                Process::new(child.name(), child.pid(), port.number(), child.log())
            })
            .collect()
    }

    /// # Errors
    /// When something does not end in time.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        for running in std::iter::once(&mut self.prometheus).chain(&mut self.exporters) {
            // Exporters end with SIGTERM's own status; Prometheus writes its state first.
            outcome = outcome.and(running.child.stop(Signal::SIGTERM, STOP).await.map(drop));
        }
        outcome
    }
}

async fn start_prometheus(
    parent: &Path,
    dir: &Path,
    port: Port,
    account: Option<Account>,
) -> anyhow::Result<Running> {
    let number = port.number();
    let start = Start::new("prometheus", shipped::server("prometheus")?, parent.join("prometheus.log"))
        .account(account)
        .args([
            format!("--config.file={}", dir.join("prometheus.yml").display()),
            format!("--storage.tsdb.path={}", dir.join("data").display()),
            "--storage.tsdb.retention.time=15d".into(),
            "--storage.tsdb.retention.size=2GB".into(),
            format!("--web.listen-address=127.0.0.1:{number}"),
            "--web.console.libraries=/usr/share/prometheus/console_libraries".into(),
            "--web.console.templates=/usr/share/prometheus/consoles".into(),
            "--log.level=warn".into(),
        ]);
    let mut child = start.spawn().await?;
    child.until("is ready", READY, || answers(number, "/-/ready")).await?;
    Ok(Running { child, port })
}

async fn answers(port: u16, path: &str) -> anyhow::Result<()> {
    match http::get(port, path).await? {
        (200, _) => Ok(()),
        (status, body) => bail!("{status}: {}", body.trim()),
    }
}

fn copy(from: &Path, to: &Path, account: Option<&Account>) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(from).with_context(|| format!("read {}", from.display()))?;
    private_file(to, &text, account)
}

/// As Prometheus' file_sd reads it; JSON is YAML.
fn list(targets: &[Target]) -> String {
    let groups: Vec<serde_json::Value> = targets
        .iter()
        .map(|target| {
            let mut labels = serde_json::Map::new();
            labels.insert("instance".into(), target.instance.clone().into());
            if !target.job.is_empty() {
                labels.insert("job".into(), target.job.clone().into());
            }
            for (name, value) in &target.labels {
                labels.insert((*name).into(), value.clone().into());
            }
            serde_json::json!({ "targets": [format!("127.0.0.1:{}", target.port)], "labels": labels })
        })
        .collect();
    serde_json::Value::Array(groups).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_keeps_its_labels() {
        let target =
            Target::new("redis", "redis-region1", 9121).label("__param_target", "redis://127.0.0.1:6379");
        let list: serde_json::Value = serde_json::from_str(&list(&[target])).unwrap();
        assert_eq!(
            list,
            serde_json::json!([{ "targets": ["127.0.0.1:9121"], "labels": {
                "job": "redis", "instance": "redis-region1", "__param_target": "redis://127.0.0.1:6379" } }])
        );
    }
}
