//! Prometheus and its exporters beside the run. They take a second or two to start; nothing waits for them.

use std::path::Path;
use std::time::Instant;

use tokio::task::JoinSet;

use super::started::{taken, up_line};
use playground::cluster::Cluster;
use playground::monitoring::{Monitoring, Servers, Target};
use playground::port::Port;
use playground::process::Process;
use playground::program::Program;
use playground::redis::Redis;

/// As in the contract.
const PORT: u16 = 9090;

/// All of it, started or on its way.
#[derive(Debug)]
pub(super) struct Watching {
    running: Option<Monitoring>,
    starting: JoinSet<anyhow::Result<(Monitoring, Vec<String>)>>,
    failure: Option<String>,
}

impl Watching {
    /// Starts it, without waiting.
    pub(super) fn start(
        dir: &Path,
        cluster: &Cluster,
        mosquitto: Option<u16>,
        redis: Option<&Redis>,
    ) -> anyhow::Result<Self> {
        let servers = Servers::of(cluster, mosquitto, redis);
        let dir = dir.to_owned();
        let mut starting = JoinSet::new();
        starting.spawn(async move {
            let started = Instant::now();
            let port = Port::near(PORT)?;
            let mut lines: Vec<String> = taken("prometheus", PORT, port.number()).into_iter().collect();
            let monitoring = Monitoring::start(&dir, port, &servers).await?;
            let number = monitoring.port();
            lines.push(up_line("prometheus", number, started, &format!("http://127.0.0.1:{number}/alerts")));
            anyhow::Ok((monitoring, lines))
        });
        Ok(Self { running: None, starting, failure: None })
    }

    /// Takes over what has come up since and returns what there is to say of it. `None` when nothing has.
    pub(super) fn progress(&mut self) -> Option<Vec<String>> {
        match self.starting.try_join_next()?.map_err(anyhow::Error::from).flatten() {
            Ok((monitoring, lines)) => {
                self.running = Some(monitoring);
                Some(lines)
            }
            Err(error) => {
                self.failure = Some(format!("{error:#}"));
                Some(Vec::new())
            }
        }
    }

    /// Says what there is to watch now.
    pub(super) fn watch<'p>(
        &mut self,
        programs: impl Iterator<Item = &'p Program>,
        rabbitmq: Option<u16>,
    ) -> anyhow::Result<()> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let targets: Vec<Target> = programs.map(Target::of).collect();
        running.watch(&targets, rabbitmq)
    }

    /// What ended unasked, or did not start.
    pub(super) fn died(&mut self) -> Option<String> {
        self.failure.clone().or_else(|| self.running.as_mut()?.died())
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        self.running.iter().flat_map(Monitoring::processes).collect()
    }

    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        self.starting.shutdown().await;
        match self.running {
            Some(running) => running.stop().await,
            None => Ok(()),
        }
    }
}
