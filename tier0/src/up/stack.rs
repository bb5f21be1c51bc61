//! What runs: started in the order of what needs what, side by side where nothing does.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::regions::RegionsSeen;
use super::sessions::Sessions;
use super::started::{CONSUMER_GRACE, SIMULATOR_GRACE, taken, up_line};
use super::watching::Watching;
use crate::home::Home;
use crate::terminal::say;
use crate::up::args::{Part, UpArgs};
use playground::cluster::{Cluster, Options};
use playground::metrics::Metrics;
use playground::mosquitto::Mosquitto;
use playground::port::Port;
use playground::postgres::{Role, connect};
use playground::process::Process;
use playground::program::{Launch, Program};
use playground::regions::{self, Regions};

const POSTGRES_PORTS: [u16; 2] = [5432, 5433];
const MQTT_PORT: u16 = 1883;
const CONSUMER_PORT: u16 = 9101;
const SIMULATOR_PORT: u16 = 9102;
const READY: Duration = Duration::from_secs(60);
/// A system that is up for weeks has more of them than anybody reads.
const NOTICES: usize = 200;

#[derive(Debug)]
pub(super) struct Stack {
    // Clients before servers: dropping goes in this order.
    pub(super) watching: Option<Watching>,
    pub(super) sessions: Option<Sessions>,
    pub(super) simulator: Option<Program>,
    pub(super) consumer: Option<Program>,
    pub(super) broker: Option<Mosquitto>,
    /// Unless there is only one region.
    pub(super) regions: Option<Regions>,
    pub(super) cluster: Cluster,
    /// The tables held rows before this run.
    pub(super) kept: bool,
    /// What happened, for the screen, and to be said when it is gone.
    pub(super) notices: Vec<String>,
    /// As the orchestrator said last.
    pub(super) seen: Option<RegionsSeen>,
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
        let ((cluster, regions, kept), broker) =
            tokio::try_join!(databases(dir, with(Part::Region2)), broker)?;
        let mut stack = Self {
            watching: None,
            sessions: None,
            simulator: None,
            consumer: None,
            broker,
            regions,
            cluster,
            kept,
            notices: Vec::new(),
            seen: None,
        };
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
            let redis = self.regions.as_ref().and_then(|regions| regions.redis.as_ref());
            self.watching = Some(Watching::start(home.data(), &self.cluster, mosquitto, redis)?);
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
            let managers = self.regions.iter();
            let managers = managers.flat_map(|regions| regions.agents.iter().chain([&regions.orchestrator]));
            watching.watch(telemetry.chain(activity).chain(managers), rabbitmq)?;
        }
        Ok(Some(sessions.into_iter().chain(watching).flatten().collect()))
    }

    /// Keeps what happened, the newest [`NOTICES`] of it.
    pub(super) fn note(&mut self, notice: String) {
        self.notices.push(notice);
        let beyond = self.notices.len().saturating_sub(NOTICES);
        self.notices.drain(..beyond);
    }

    /// The simulator has sent what it was told to send (`-- --count N`) and ended well.
    pub(super) fn finished(&mut self) -> bool {
        self.simulator.as_mut().and_then(Program::ended).is_some_and(|status| status.success())
    }

    /// What ended unasked, with the end of its log.
    pub(super) fn died(&mut self) -> Option<String> {
        for program in [&mut self.simulator, &mut self.consumer].into_iter().flatten() {
            if let Some(status) = program.ended() {
                let tail = playground::child::tail(program.log(), 15);
                return Some(format!("{} ended by itself ({status}){tail}", program.name()));
            }
        }
        if let Some(what) = self.sessions.as_mut().and_then(Sessions::died) {
            return Some(what);
        }
        if let Some(what) = self.watching.as_mut().and_then(Watching::died) {
            return Some(what);
        }
        // With agents a node that ends is their affair, and the orchestrator's.
        let alone = self.regions.is_none();
        for node in self.cluster.nodes.iter_mut().filter(|_| alone) {
            if !node.is_running() {
                return Some(format!(
                    "{} ended by itself{}",
                    node.name(),
                    playground::child::tail(node.log(), 15)
                ));
            }
        }
        let broker = self.broker.as_mut()?;
        (!broker.is_running())
            .then(|| format!("mosquitto ended by itself{}", playground::child::tail(broker.log(), 15)))
    }

    /// `None` when there is no consumer or it does not answer now.
    pub(super) async fn consumer_metrics(&self) -> Option<Metrics> {
        self.consumer.as_ref()?.metrics().await.ok()
    }

    pub(super) async fn simulator_metrics(&self) -> Option<Metrics> {
        self.simulator.as_ref()?.metrics().await.ok()
    }

    /// Starts again what has ended beside the nodes, as a service manager would, and notes who is primary now.
    /// What there is to say about it is in the answer: the screen may be in use.
    pub(super) async fn tend(&mut self) -> anyhow::Result<Vec<String>> {
        let Some(regions) = &mut self.regions else { return Ok(Vec::new()) };
        let restarted = regions.restart_ended().await?;
        let mut notices: Vec<String> =
            restarted.iter().map(|name| format!("{name} had ended and was started again")).collect();
        self.seen = None;
        if let Ok(status) = regions.status().await {
            self.seen = Some(RegionsSeen::of(&status));
            let before = self.cluster.primary().name().to_owned();
            self.cluster.led_by(&status.current_region)?;
            if before != status.current_region {
                let gap = status.last_failover.and_then(|last| last.write_gap_ms);
                let gap = gap.map_or_else(String::new, |ms| format!(" (nobody could write for {ms:.0} ms)"));
                notices.push(format!("the primary is {} now{gap}", status.current_region));
            }
        }
        Ok(notices)
    }

    /// Waits until every node has everything that was committed.
    pub(super) async fn settle(&mut self, limit: Duration) -> anyhow::Result<()> {
        if let Some(regions) = &self.regions {
            let status = regions.whole(limit).await?;
            self.cluster.led_by(&status.current_region)?;
        }
        self.cluster.wait_replayed(limit).await
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        let nodes = self.cluster.nodes.iter().map(|node| (node.name(), node.pid(), node.port(), node.log()));
        let broker =
            self.broker.iter().map(|broker| ("mosquitto", broker.pid(), broker.port(), broker.log()));
        let regions = self.regions.iter();
        let managers =
            regions.clone().flat_map(|regions| regions.agents.iter().chain([&regions.orchestrator]));
        let programs = managers.chain([&self.consumer, &self.simulator].into_iter().flatten());
        let redis = regions.filter_map(|regions| regions.redis.as_ref());
        let redis = redis.flat_map(|redis| redis.instances.iter().chain(&redis.sentinels));
        let redis = redis.map(|server| (server.name(), server.pid(), server.port(), server.log()));
        let programs = programs.map(|program| (program.name(), program.pid(), program.port(), program.log()));
        nodes
            .chain(redis)
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
            async {
                match self.regions.take() {
                    Some(regions) => regions.stop().await,
                    None => self.cluster.stop().await,
                }
            }
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

/// The nodes with the schema and the registry in place, what manages them, and whether their data is that of an earlier
/// run.
async fn databases(dir: &Path, standby: bool) -> anyhow::Result<(Cluster, Option<Regions>, bool)> {
    let started = Instant::now();
    let standbys = usize::from(standby);
    let options = Options { standbys, settings: Vec::new(), ports: POSTGRES_PORTS.to_vec(), sync: true };
    let kept = Cluster::exists(dir);
    let managed = dir.join("orchestrator");
    if kept && !standby && managed.exists() {
        bail!("the data is that of two regions that wait for each other; --fresh starts anew with one");
    }
    let mut cluster = match (kept, standby) {
        (true, true) => Cluster::attach(dir, options, &Cluster::passwords(dir)?)?,
        (true, false) => Cluster::open(dir, options).await?,
        (false, _) => {
            Cluster::remove(dir)?;
            if managed.exists() {
                std::fs::remove_dir_all(&managed).context("forget the failovers of data that is gone")?;
            }
            Cluster::create_filled(dir, options, fill).await?
        }
    };
    for (node, wanted) in cluster.nodes.iter().zip(POSTGRES_PORTS) {
        taken(node.name(), wanted, node.port()).into_iter().for_each(say);
    }
    let regions = if standby { Some(take_over(dir, &mut cluster).await?) } else { None };
    if kept {
        fill(cluster.primary().config(Role::Owner)).await?;
    }
    for node in &cluster.nodes {
        let primary = node.name() == cluster.primary().name();
        report(node.name(), node.port(), started, if primary { "primary" } else { "synchronous standby" });
    }
    if let Some(regions) = &regions {
        report(
            "orchestrator",
            regions.orchestrator.port(),
            started,
            "/status /history; tier0 failover region2",
        );
        if let Some(redis) = &regions.redis {
            for server in &redis.instances {
                report(server.name(), server.port(), started, "behind three Sentinels");
            }
        }
    }
    Ok((cluster, regions, kept))
}

/// Puts agents, orchestrator and Redis around the nodes, and waits until both have everything.
async fn take_over(dir: &Path, cluster: &mut Cluster) -> anyhow::Result<Regions> {
    cluster.hand_over().await?;
    let plan = regions::Plan { ports: Some(regions::CONTRACT), redis: true, ..regions::Plan::default() };
    let regions = Regions::start(dir, cluster, plan).await?;
    let status = regions.whole(READY).await?;
    cluster.led_by(&status.current_region)?;
    Ok(regions)
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

fn report(name: &str, port: u16, started: Instant, note: &str) {
    say(up_line(name, port, started, note));
}
