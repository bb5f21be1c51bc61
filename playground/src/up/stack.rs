//! What runs: started in the order of what needs what, side by side where nothing does.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::sessions::Sessions;
use super::watching::Watching;
use crate::cli::{Part, UpArgs, say};
use crate::cluster::{Cluster, Options};
use crate::home::{Home, Process};
use crate::metrics::Metrics;
use crate::mosquitto::Mosquitto;
use crate::port::Port;
use crate::postgres::{Role, connect};
use crate::program::{Launch, Program};

const POSTGRES_PORTS: [u16; 2] = [5432, 5433];
const MQTT_PORT: u16 = 1883;
const CONSUMER_PORT: u16 = 9101;
const SIMULATOR_PORT: u16 = 9102;
const READY: Duration = Duration::from_secs(60);
/// The simulator waits for acknowledgements that may be stuck behind a full broker.
pub(super) const SIMULATOR_GRACE: Duration = Duration::from_secs(90);
pub(super) const CONSUMER_GRACE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Stack {
    // Clients before servers: dropping goes in this order.
    pub(super) watching: Option<Watching>,
    pub(super) sessions: Option<Sessions>,
    pub(super) simulator: Option<Program>,
    pub(super) consumer: Option<Program>,
    pub(super) broker: Option<Mosquitto>,
    pub(super) cluster: Cluster,
    /// The tables held rows before this run.
    pub(super) kept: bool,
}

impl Stack {
    /// Starts the servers and the consumer; the simulator comes when somebody is there to listen.
    pub(super) async fn start(dir: &Path, args: &UpArgs) -> anyhow::Result<Self> {
        let with = |part: Part| !args.without.contains(&part);
        let broker = async {
            if !with(Part::Mosquitto) {
                return Ok(None);
            }
            let started = Instant::now();
            let broker = Mosquitto::open(dir, port("mosquitto", MQTT_PORT)?, &[]).await?;
            report("mosquitto", broker.port(), started, "");
            anyhow::Ok(Some(broker))
        };
        let ((cluster, kept), broker) = tokio::try_join!(databases(dir, with(Part::Region2)), broker)?;
        let mut stack =
            Self { watching: None, sessions: None, simulator: None, consumer: None, broker, cluster, kept };
        if with(Part::MqttConsumer) {
            let started = Instant::now();
            let launch = Launch::new("mqtt-consumer").envs(stack.environment());
            let mut consumer = launch.start_on(dir, port("mqtt-consumer", CONSUMER_PORT)?).await?;
            consumer.ready(READY).await?;
            report("mqtt-consumer", consumer.port(), started, "/metrics /health");
            stack.consumer = Some(consumer);
        }
        Ok(stack)
    }

    pub(super) async fn start_simulator(&mut self, home: &Home, args: &UpArgs) -> anyhow::Result<()> {
        if args.without.contains(&Part::DeviceSimulator) {
            say("no device-simulator: bring your own client");
            return Ok(());
        }
        let started = Instant::now();
        let ledger = home.ledger();
        if ledger.exists() {
            std::fs::remove_file(&ledger).with_context(|| format!("delete {}", ledger.display()))?;
        }
        let mut options = vec!["--ledger".to_owned(), ledger.display().to_string()];
        for (flag, value) in [
            ("--devices", args.devices.map(|n| n.to_string())),
            ("--interval", args.interval.map(|time| format!("{}us", time.as_micros()))),
            ("--rate", args.rate.clone()),
            ("--qos", args.qos.map(|n| n.to_string())),
            ("--seed", args.seed.map(|n| n.to_string())),
        ] {
            options.extend(value.into_iter().flat_map(|value| [flag.to_owned(), value]));
        }
        options.extend(args.simulator_args.iter().cloned());
        let launch = Launch::new("device-simulator").envs(self.broker_environment()).args(options);
        // Not waited for: publishing starts with its first connection, and the view shows what comes.
        let simulator = launch.start_on(home.data(), port("device-simulator", SIMULATOR_PORT)?).await?;
        report("device-simulator", simulator.port(), started, "/metrics /health");
        self.simulator = Some(simulator);
        Ok(())
    }

    /// User activity comes up beside telemetry, which does not wait for it.
    pub(super) fn start_sessions(&mut self, home: &Home, args: &UpArgs) -> anyhow::Result<()> {
        let sessions = Sessions::start(home.data(), home.session_ledger(), &self.cluster, args)?;
        self.sessions = Some(sessions);
        Ok(())
    }

    /// Prometheus comes up beside the rest; nothing waits for it.
    pub(super) fn start_watching(&mut self, home: &Home, args: &UpArgs) -> anyhow::Result<()> {
        if !args.without.contains(&Part::Monitoring) {
            let mosquitto = self.broker.as_ref().map(Mosquitto::port);
            self.watching = Some(Watching::start(home.data(), &self.cluster, mosquitto)?);
        }
        Ok(())
    }

    /// Takes over what has come up since and returns what there is to say of it. `None` when nothing has.
    pub(super) fn progress(&mut self) -> anyhow::Result<Option<Vec<String>>> {
        let sessions = self.sessions.as_mut().and_then(Sessions::progress);
        let watching = self.watching.as_mut().and_then(Watching::progress);
        if sessions.is_none() && watching.is_none() {
            return Ok(None);
        }
        if let Some(watching) = &mut self.watching {
            let telemetry = [&self.consumer, &self.simulator].into_iter().flatten();
            let activity = self.sessions.iter().flat_map(Sessions::programs);
            let rabbitmq = self.sessions.as_ref().and_then(Sessions::metrics_port);
            watching.watch(telemetry.chain(activity), rabbitmq)?;
        }
        Ok(Some(sessions.into_iter().chain(watching).flatten().collect()))
    }

    /// The simulator has sent what it was told to send (`-- --count N`) and ended well.
    pub(super) fn finished(&mut self) -> bool {
        self.simulator.as_mut().and_then(Program::ended).is_some_and(|status| status.success())
    }

    /// What ended unasked, with the end of its log.
    pub(super) fn died(&mut self) -> Option<String> {
        for program in [&mut self.simulator, &mut self.consumer].into_iter().flatten() {
            if let Some(status) = program.ended() {
                let tail = crate::child::tail(program.log(), 15);
                return Some(format!("{} ended by itself ({status}){tail}", program.name()));
            }
        }
        if let Some(what) = self.sessions.as_mut().and_then(Sessions::died) {
            return Some(what);
        }
        if let Some(what) = self.watching.as_mut().and_then(Watching::died) {
            return Some(what);
        }
        for node in &mut self.cluster.nodes {
            if !node.is_running() {
                return Some(format!(
                    "{} ended by itself{}",
                    node.name(),
                    crate::child::tail(node.log(), 15)
                ));
            }
        }
        let broker = self.broker.as_mut()?;
        (!broker.is_running())
            .then(|| format!("mosquitto ended by itself{}", crate::child::tail(broker.log(), 15)))
    }

    /// `None` when there is no consumer or it does not answer now.
    pub(super) async fn consumer_metrics(&self) -> Option<Metrics> {
        self.consumer.as_ref()?.metrics().await.ok()
    }

    pub(super) async fn simulator_metrics(&self) -> Option<Metrics> {
        self.simulator.as_ref()?.metrics().await.ok()
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        let nodes = self.cluster.nodes.iter().map(|node| (node.name(), node.pid(), node.port(), node.log()));
        let broker =
            self.broker.iter().map(|broker| ("mosquitto", broker.pid(), broker.port(), broker.log()));
        let programs = [&self.consumer, &self.simulator].into_iter().flatten();
        let programs = programs.map(|program| (program.name(), program.pid(), program.port(), program.log()));
        nodes
            .chain(broker)
            .chain(programs)
            .filter_map(|(name, pid, port, log)| Some(Process::new(name, pid?, port, log)))
            .chain(self.sessions.iter().flat_map(Sessions::processes))
            .chain(self.watching.iter().flat_map(Watching::processes))
            .collect()
    }

    /// Stops the servers; our programs are stopped by then.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        let mut outcome = match self.watching.take() {
            Some(watching) => watching.stop().await,
            None => Ok(()),
        };
        if let Some(sessions) = self.sessions.take() {
            outcome = outcome.and(sessions.stop().await);
        }
        if let Some(simulator) = &mut self.simulator {
            outcome = outcome.and(simulator.terminate(SIMULATOR_GRACE).await);
        }
        if let Some(consumer) = &mut self.consumer {
            outcome = outcome.and(consumer.terminate(CONSUMER_GRACE).await);
        }
        let (broker, cluster) = tokio::join!(
            async {
                match &mut self.broker {
                    Some(broker) => broker.stop().await,
                    None => Ok(()),
                }
            },
            self.cluster.stop()
        );
        outcome.and(broker).and(cluster)
    }

    fn environment(&self) -> Vec<(String, String)> {
        let mut environment = self.cluster.environment();
        environment.extend(self.broker_environment());
        environment
    }

    fn broker_environment(&self) -> Vec<(String, String)> {
        self.broker.as_ref().map(Mosquitto::environment).unwrap_or_default()
    }
}

/// The nodes with the schema and the registry in place, and whether their data is that of an earlier run.
async fn databases(dir: &Path, standby: bool) -> anyhow::Result<(Cluster, bool)> {
    let started = Instant::now();
    let standbys = usize::from(standby);
    let options = Options { standbys, settings: Vec::new(), ports: POSTGRES_PORTS.to_vec(), sync: true };
    let kept = Cluster::exists(dir);
    let cluster = if kept {
        let cluster = Cluster::open(dir, options).await?;
        fill(cluster.primary().config(Role::Owner)).await?;
        cluster
    } else {
        Cluster::remove(dir)?;
        Cluster::create_filled(dir, options, fill).await?
    };
    for (node, wanted) in cluster.nodes.iter().zip(POSTGRES_PORTS) {
        taken(node.name(), wanted, node.port()).into_iter().for_each(say);
    }
    for (index, node) in cluster.nodes.iter().enumerate() {
        report(node.name(), node.port(), started, if index == 0 { "primary" } else { "synchronous standby" });
    }
    Ok((cluster, kept))
}

/// The schema, 10 sites and 100,000 devices.
async fn fill(owner: tokio_postgres::Config) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut db = connect(&owner).await?;
    ingest::schema::migrate(&mut db).await?;
    ingest::registry::fill(&db).await?;
    let seconds = started.elapsed().as_secs_f64();
    say(format!("  {:<18}{:<24}{seconds:>6.2} s", "schema", "registry of 100,000"));
    Ok(())
}

fn port(name: &str, wanted: u16) -> anyhow::Result<Port> {
    let port = Port::near(wanted)?;
    taken(name, wanted, port.number()).into_iter().for_each(say);
    Ok(port)
}

/// What there is to say when a server got another port than it should have.
pub(super) fn taken(name: &str, wanted: u16, used: u16) -> Option<String> {
    (used != wanted).then(|| format!("  {name}: port {wanted} is taken, using {used} instead"))
}

fn report(name: &str, port: u16, started: Instant, note: &str) {
    say(up_line(name, port, started, note));
}

/// The line an operator sees when something is up.
pub(super) fn up_line(name: &str, port: u16, started: Instant, note: &str) -> String {
    let address = format!("127.0.0.1:{port}");
    format!("  {name:<18}{address:<24}{:>6.2} s  {note}", started.elapsed().as_secs_f64())
}
