//! Everything that exports something, on free ports: both regions under their agents with the orchestrator, Redis with
//! Sentinels, both brokers, both consumers, both simulators (with some trouble), Prometheus with its exporters.

use std::time::Duration;

use playground::cluster::{Cluster, Options};
use playground::monitoring::{Monitoring, Servers, Target};
use playground::mosquitto::Mosquitto;
use playground::port::Port;
use playground::postgres::{Db, Role};
use playground::program::{Launch, Program};
use playground::rabbitmq::{Ports, RabbitMq};
use playground::regions::{Plan, Regions};
use playground::scratch::Scratch;

const READY: Duration = Duration::from_secs(120);

/// Dropped in this order.
pub(super) struct Stage {
    pub(super) monitoring: Monitoring,
    /// How many Prometheus is to reach.
    pub(super) targets: usize,
    programs: Vec<Program>,
    regions: Regions,
    _mosquitto: Mosquitto,
    _rabbitmq: RabbitMq,
    cluster: Cluster,
    _scratch: Scratch,
}

impl Stage {
    pub(super) async fn start() -> Self {
        let scratch = Scratch::new().unwrap();
        let dir = scratch.path();
        let ports = Ports::new(Port::free().unwrap(), Port::free().unwrap()).unwrap();
        let ((cluster, regions), mosquitto, rabbitmq) = tokio::join!(
            regions(&scratch),
            Mosquitto::start(&scratch, &["sys_interval 2"]),
            RabbitMq::open(dir, ports, true, &[]),
        );
        let (mosquitto, rabbitmq) = (mosquitto.unwrap(), rabbitmq.unwrap());
        let launches = [
            Launch::new("mqtt-consumer").envs(cluster.environment()).envs(mosquitto.environment()),
            Launch::new("rabbitmq-consumer").envs(cluster.writer_environment()).envs(rabbitmq.environment()),
            Launch::new("device-simulator").envs(mosquitto.environment()).args([
                "--devices",
                "2000",
                "--interval",
                "1s",
                "--trouble",
                "not_json=0.002",
                "--trouble",
                "duplicate=0.01",
            ]),
            Launch::new("user-simulator")
                .envs(rabbitmq.environment())
                .args(["--users", "500", "--rate", "50"]),
        ];
        let mut programs = Vec::new();
        for launch in launches {
            let mut program = launch.start(dir).await.unwrap();
            program.ready(READY).await.unwrap();
            programs.push(program);
        }
        let servers = Servers::of(&cluster, Some(mosquitto.port()), regions.redis.as_ref());
        let mut monitoring = Monitoring::start(dir, Port::free().unwrap(), &servers).await.unwrap();
        let managers = regions.agents.iter().chain([&regions.orchestrator]);
        let targets: Vec<Target> = programs.iter().chain(managers).map(Target::of).collect();
        monitoring.watch(&targets, Some(rabbitmq.metrics_port())).unwrap();
        // Beside those: two nodes, two Redis, three Sentinels, the MQTT broker, RabbitMQ twice, the machine, Prometheus.
        let targets = targets.len() + 12;
        Self {
            monitoring,
            targets,
            programs,
            regions,
            _mosquitto: mosquitto,
            _rabbitmq: rabbitmq,
            cluster,
            _scratch: scratch,
        }
    }

    /// Into the standby, as dashboards do.
    pub(super) async fn reader(&self) -> Db {
        let primary = self.cluster.primary().name();
        let standby = self.cluster.nodes.iter().find(|node| node.name() != primary).unwrap();
        standby.connect(Role::Reader).await.unwrap()
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub(super) fn token(&self) -> String {
        self.regions.token().unwrap()
    }

    /// Where our processes serve.
    pub(super) fn processes(&self) -> Vec<u16> {
        let managers = self.regions.agents.iter().chain([&self.regions.orchestrator]);
        self.programs.iter().chain(managers).map(Program::port).collect()
    }

    /// What a port of the contract is here.
    pub(super) fn port(&self, port: u16) -> Option<u16> {
        let program =
            |name: &str| self.programs.iter().find(|program| program.name() == name).map(Program::port);
        match port {
            8003 => Some(self.regions.orchestrator.port()),
            8101 | 8102 => self.regions.agents.get(usize::from(port - 8101)).map(Program::port),
            9090 => Some(self.monitoring.port()),
            9101 => program("mqtt-consumer"),
            9103 => program("rabbitmq-consumer"),
            _ => None,
        }
    }

    pub(super) async fn stop(self) {
        let Self { monitoring, programs, regions, .. } = self;
        monitoring.stop().await.unwrap();
        for mut program in programs.into_iter().rev() {
            program.terminate(READY).await.unwrap();
        }
        regions.stop().await.unwrap();
    }
}

/// Two regions that have failed over once, so that there is a last failover to show.
async fn regions(scratch: &Scratch) -> (Cluster, Regions) {
    let mut cluster = Cluster::start(scratch, Options::default()).await.unwrap();
    let mut db = cluster.connect(Role::Owner).await.unwrap();
    ingest::schema::migrate(&mut db).await.unwrap();
    ingest::registry::fill(&db).await.unwrap();
    drop(db);
    cluster.hand_over().await.unwrap();
    let plan = Plan { redis: true, ..Plan::default() };
    let regions = Regions::start(scratch.path(), &mut cluster, plan).await.unwrap();
    regions.whole(READY).await.unwrap();
    let (status, body) = regions.failover("region2", "").await.unwrap();
    assert_eq!(status, 200, "{body}");
    let status = regions.whole(READY).await.unwrap();
    cluster.led_by(&status.current_region).unwrap();
    (cluster, regions)
}
