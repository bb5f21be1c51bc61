//! User activity beside telemetry: RabbitMQ, `rabbitmq-consumer`, `user-simulator`.
//!
//! An Erlang machine takes some seconds to start. Telemetry does not wait for it: all this starts on its own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use service::settings::{SettingsArgs, load as load_settings};
use simulators::user::settings::UserSimulatorSettings;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use wire::rabbitmq::QueueType;
use wire::sessions::SessionLedger;

use super::started::{CONSUMER_GRACE, SIMULATOR_GRACE, taken, up_line};
use crate::terminal::say;
use crate::up::args::{Part, UpArgs};
use crate::verify::sessions::{SessionFindings, compare, read};
use playground::cluster::Cluster;
use playground::metrics::Metrics;
use playground::port::Port;
use playground::postgres::Role;
use playground::process::Process;
use playground::program::{Launch, Program};
use playground::rabbitmq::{Ports, RabbitMq};
use playground::shipped;

const AMQP_PORT: u16 = 5672;
const MANAGEMENT_PORT: u16 = 15_672;
const CONSUMER_PORT: u16 = 9103;
const SIMULATOR_PORT: u16 = 9104;
const READY: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);
/// Nothing new for this long: what has not come will not come.
const QUIET: Duration = Duration::from_secs(10);

/// What runs of it.
#[derive(Debug, Default)]
struct Running {
    // Clients before servers: dropping goes in this order.
    simulator: Option<Program>,
    consumer: Option<Program>,
    broker: Option<RabbitMq>,
    /// Of one that is being started: where what is up already is told.
    told: Option<mpsc::Sender<Told>>,
}

/// One line for an operator, and the process that it is about.
type Told = (String, Option<Process>);

/// More than are ever started.
const TOLD: usize = 16;

/// All of it, started or on its way.
#[derive(Debug)]
pub(super) struct Sessions {
    running: Running,
    starting: JoinSet<anyhow::Result<Running>>,
    told: mpsc::Receiver<Told>,
    /// What is up of it while the rest is being started.
    early: Vec<Process>,
    /// Nothing more is to be started: the run ends before all of it was up.
    ending: CancellationToken,
    failure: Option<String>,
    ledger: PathBuf,
    /// Messages seen at the sample before, for the rate.
    last: Option<(Instant, u64)>,
}

impl Sessions {
    /// Starts what is wanted, without waiting.
    pub(super) fn start(
        dir: &Path,
        ledger: PathBuf,
        cluster: &Cluster,
        args: &UpArgs,
    ) -> anyhow::Result<Self> {
        if ledger.exists() {
            std::fs::remove_file(&ledger).with_context(|| format!("delete {}", ledger.display()))?;
        }
        let mut starting = JoinSet::new();
        let with = |part: Part| !args.without.contains(&part);
        let broker = with(Part::Rabbitmq);
        // Without it they would end at once.
        let parts = (broker, broker && with(Part::RabbitmqConsumer), broker && with(Part::UserSimulator));
        let plan = (dir.to_owned(), cluster.writer_environment(), ledger.clone(), args.seed);
        let ending = CancellationToken::new();
        let (sender, told) = mpsc::channel(TOLD);
        starting.spawn(bring_up(plan, parts, sender, ending.clone()));
        let running = Running::default();
        Ok(Self { running, starting, told, early: Vec::new(), ending, failure: None, ledger, last: None })
    }

    /// Takes over what has come up since and returns what there is to say of it. `None` when nothing has.
    pub(super) fn progress(&mut self) -> Option<Vec<String>> {
        let outcome = self.starting.try_join_next();
        let mut lines = Vec::new();
        while let Ok((line, process)) = self.told.try_recv() {
            lines.push(line);
            self.early.extend(process);
        }
        if let Some(outcome) = outcome {
            self.take(outcome.map_err(anyhow::Error::from).flatten());
            return Some(lines);
        }
        (!lines.is_empty()).then_some(lines)
    }

    fn take(&mut self, outcome: anyhow::Result<Running>) {
        self.early.clear();
        match outcome {
            Ok(running) => self.running = running,
            Err(error) => self.failure = Some(format!("{error:#}")),
        }
    }

    /// What ended unasked, or did not start.
    pub(super) fn died(&mut self) -> Option<String> {
        if let Some(failure) = &self.failure {
            return Some(failure.clone());
        }
        for program in [&mut self.running.simulator, &mut self.running.consumer].into_iter().flatten() {
            if let Some(status) = program.ended() {
                let tail = playground::child::tail(program.log(), 15);
                return Some(format!("{} ended by itself ({status}){tail}", program.name()));
            }
        }
        let broker = self.running.broker.as_mut()?;
        (!broker.is_running())
            .then(|| format!("rabbitmq ended by itself{}", playground::child::tail(broker.log(), 15)))
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        let Running { simulator, consumer, broker, .. } = &self.running;
        let broker = broker.iter().map(|broker| ("rabbitmq", broker.pid(), broker.port(), broker.log()));
        let programs = [consumer, simulator].into_iter().flatten();
        let programs = programs.map(|program| (program.name(), program.pid(), program.port(), program.log()));
        broker
            .chain(programs)
            .filter_map(|(name, pid, port, log)| Some(Process::new(name, pid?, port, log)))
            .chain(self.early.iter().cloned())
            .collect()
    }

    /// Our programs of it that are up.
    pub(super) fn programs(&self) -> impl Iterator<Item = &Program> {
        [&self.running.consumer, &self.running.simulator].into_iter().flatten()
    }

    /// Where RabbitMQ tells Prometheus of itself.
    pub(super) fn metrics_port(&self) -> Option<u16> {
        self.running.broker.as_ref().map(RabbitMq::metrics_port)
    }

    /// Messages per second since the call before; `None` while there is no consumer.
    pub(super) async fn rate(&mut self) -> Option<f64> {
        let metrics = self.consumer_metrics().await?;
        let (now, received) = (Instant::now(), metrics.count("ingest_received_total"));
        let before = self.last.replace((now, received));
        let (then, before) = before.unwrap_or((now, received));
        let elapsed = now.duration_since(then).as_secs_f64().max(0.001);
        #[allow(clippy::cast_precision_loss, reason = "a rate for the eye")]
        Some(received.saturating_sub(before) as f64 / elapsed)
    }

    async fn consumer_metrics(&self) -> Option<Metrics> {
        self.running.consumer.as_ref()?.metrics().await.ok()
    }

    /// Ends the users and waits until everything confirmed is in the table. `None` without a simulator.
    ///
    /// # Errors
    /// When something does not end in order.
    pub(super) async fn finish(&mut self, cluster: &Cluster) -> anyhow::Result<Option<SessionLedger>> {
        self.ending.cancel();
        if let Some(outcome) = self.starting.join_next().await {
            self.take(outcome.map_err(anyhow::Error::from).flatten());
            while let Ok((line, _)) = self.told.try_recv() {
                say(line);
            }
        }
        if let Some(failure) = &self.failure {
            bail!("{failure}");
        }
        let Some(simulator) = &mut self.running.simulator else { return Ok(None) };
        simulator.terminate(SIMULATOR_GRACE).await?;
        let ledger = load(&self.ledger)?;
        if self.running.consumer.is_some() {
            self.drain(cluster, &ledger).await?;
        }
        if let Some(consumer) = &mut self.running.consumer {
            consumer.terminate(CONSUMER_GRACE).await?;
        }
        Ok(Some(ledger))
    }

    async fn drain(&mut self, cluster: &Cluster, ledger: &SessionLedger) -> anyhow::Result<()> {
        let db = cluster.connect(Role::Owner).await?;
        let mut progress = Instant::now();
        let mut last = None;
        loop {
            let received =
                self.consumer_metrics().await.map(|metrics| metrics.count("ingest_acknowledged_total"));
            if received != last {
                (last, progress) = (received, Instant::now());
            }
            let there = compare("", ledger, &read(&db, ledger).await?).holds();
            if there || progress.elapsed() > QUIET || self.died().is_some() {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Stops the broker; our programs too, when they still run.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        self.starting.shutdown().await;
        let Running { simulator, consumer, broker, .. } = &mut self.running;
        let mut outcome = Ok(());
        if let Some(simulator) = simulator {
            outcome = outcome.and(simulator.terminate(SIMULATOR_GRACE).await);
        }
        if let Some(consumer) = consumer {
            outcome = outcome.and(consumer.terminate(CONSUMER_GRACE).await);
        }
        match broker {
            Some(broker) => outcome.and(broker.stop().await),
            None => outcome,
        }
    }
}

impl Running {
    fn port(&mut self, name: &str, wanted: u16) -> anyhow::Result<Port> {
        let port = Port::near(wanted)?;
        taken(name, wanted, port.number()).into_iter().for_each(|line| self.tell(line, None));
        Ok(port)
    }

    fn tell(&self, line: String, process: Option<Process>) {
        // Nobody listens any more when the run has ended.
        if let Some(told) = &self.told
            && let Err(error) = told.try_send((line, process))
        {
            tracing::debug!(%error, "not told");
        }
    }

    fn tell_of(&self, program: &Program, started: Instant) {
        let line = up_line(program.name(), program.port(), started, "/metrics /health");
        let process =
            program.pid().map(|pid| Process::new(program.name(), pid, program.port(), program.log()));
        self.tell(line, process);
    }
}

/// A server that is being started is waited for, whatever ends: killed in the middle of its first start it might leave data
/// that no later run can use.
async fn bring_up(
    (dir, cluster, ledger, seed): (PathBuf, Vec<(String, String)>, PathBuf, Option<u64>),
    (broker, consumer, simulator): (bool, bool, bool),
    told: mpsc::Sender<Told>,
    ending: CancellationToken,
) -> anyhow::Result<Running> {
    let mut running = Running { told: Some(told), ..Running::default() };
    let mut environment = Vec::new();
    if broker {
        let started = Instant::now();
        let amqp = running.port("rabbitmq", AMQP_PORT)?;
        let ports = Ports::new(amqp, running.port("rabbitmq management", MANAGEMENT_PORT)?)?;
        let broker = RabbitMq::open(&dir, ports, true, &[]).await?;
        let note = format!("management on {}, guest/guest", broker.management_port());
        let process = broker.pid().map(|pid| Process::new("rabbitmq", pid, broker.port(), broker.log()));
        running.tell(up_line("rabbitmq", broker.port(), started, &note), process);
        environment = broker.environment();
        running.broker = Some(broker);
    }
    if consumer && !ending.is_cancelled() {
        let started = Instant::now();
        let launch = Launch::new("rabbitmq-consumer").envs(cluster).envs(environment.clone());
        let mut consumer = launch.start_on(&dir, running.port("rabbitmq-consumer", CONSUMER_PORT)?).await?;
        consumer.ready(READY).await?;
        running.tell_of(&consumer, started);
        running.consumer = Some(consumer);
        // Nothing is published to a queue that a crash would lose.
        if let Some(broker) = &mut running.broker {
            let rabbitmq = settings()?.rabbitmq;
            if rabbitmq.queue_type == QueueType::Quorum && rabbitmq.vhost == "/" {
                broker.until_registered(&rabbitmq.queue).await?;
            }
        }
    }
    if simulator && !ending.is_cancelled() {
        let started = Instant::now();
        let mut options = vec!["--ledger".to_owned(), ledger.display().to_string()];
        options.extend(seed.into_iter().flat_map(|seed| ["--seed".to_owned(), seed.to_string()]));
        let launch = Launch::new("user-simulator").envs(environment).args(options);
        let mut simulator = launch.start_on(&dir, running.port("user-simulator", SIMULATOR_PORT)?).await?;
        // Before that it would not know what to do with a SIGTERM.
        simulator.ready(READY).await?;
        running.tell_of(&simulator, started);
        running.simulator = Some(simulator);
    }
    Ok(running)
}

/// As the programs we start read them.
fn settings() -> anyhow::Result<UserSimulatorSettings> {
    let args = SettingsArgs { config: shipped::config_path("tier0.toml").ok(), ..SettingsArgs::default() };
    Ok(load_settings(&args, std::env::vars().collect())?)
}

/// The ledger of a run.
///
/// # Errors
/// When it is not there or not one.
pub(crate) fn load(path: &Path) -> anyhow::Result<SessionLedger> {
    let file = std::fs::File::open(path).with_context(|| format!("open the ledger {}", path.display()))?;
    serde_json::from_reader(std::io::BufReader::new(file))
        .with_context(|| format!("read the ledger {}", path.display()))
}

/// What every node holds.
///
/// # Errors
/// When a node cannot be read.
pub(super) async fn look(cluster: &Cluster, ledger: &SessionLedger) -> anyhow::Result<Vec<SessionFindings>> {
    let mut findings = Vec::new();
    for node in &cluster.nodes {
        let db = node.connect(Role::Owner).await?;
        let stored = read(&db, ledger).await.with_context(|| format!("look into {}", node.name()))?;
        findings.push(compare(node.name(), ledger, &stored));
    }
    Ok(findings)
}
