//! Everything that exports something, on free ports: both regions under their agents with the orchestrator, Redis with
//! Sentinels, both brokers, both consumers, both simulators (with some trouble), Prometheus with its exporters.

use std::time::Duration;

use playground::cluster::{Cluster, Options};
use playground::monitoring::{Monitoring, MosquittoAt, PostgresAt, Servers, Target};
use playground::mosquitto::Mosquitto;
use playground::port::Port;
use playground::postgres::{DATABASE, Db, Role};
use playground::program::{Launch, Program};
use playground::rabbitmq::{Ports, RabbitMq};
use playground::redis::Redis;
use playground::scratch::Scratch;
use playground::shipped;

const TOKEN: &str = "a-token-for-people-0123456789";
const AGENT_TOKEN: &str = "a-token-for-agents-0123456789";
const READY: Duration = Duration::from_secs(60);

/// Dropped in this order.
pub(super) struct Stage {
    pub(super) monitoring: Monitoring,
    /// How many Prometheus is to reach.
    pub(super) targets: usize,
    programs: Vec<Program>,
    agents: Vec<Program>,
    _redis: Redis,
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
        let (cluster, mosquitto, rabbitmq, redis) = tokio::join!(
            cluster(&scratch),
            Mosquitto::start(&scratch, &["sys_interval 2"]),
            RabbitMq::open(dir, ports, true, &[]),
            Redis::start(&scratch),
        );
        let (mosquitto, rabbitmq, redis) = (mosquitto.unwrap(), rabbitmq.unwrap(), redis.unwrap());
        let mut agents = Vec::new();
        for node in 0..cluster.nodes.len() {
            agents.push(agent(&scratch, &cluster, node).start(dir).await.unwrap());
        }
        let launches = [
            orchestrator(&scratch, &cluster, &agents).envs(redis.environment()),
            Launch::new("mqtt-consumer").envs(cluster.environment()).envs(mosquitto.environment()),
            Launch::new("rabbitmq-consumer").envs(cluster.environment()).envs(rabbitmq.environment()),
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
        let of_redis = |servers: &[playground::redis::Server]| {
            servers.iter().map(|server| (server.name().to_owned(), server.port())).collect()
        };
        let servers = Servers {
            postgres: cluster.nodes.iter().map(postgres).collect(),
            mosquitto: Some(MosquittoAt { port: mosquitto.port() }),
            redis: of_redis(&redis.instances),
            sentinels: of_redis(&redis.sentinels),
        };
        let mut monitoring = Monitoring::start(dir, Port::free().unwrap(), &servers).await.unwrap();
        let regions = cluster.nodes.iter().zip(&agents);
        let targets: Vec<Target> = programs
            .iter()
            .map(|program| Target::new(program.name(), program.name(), program.port()))
            .chain(regions.map(|(node, agent)| Target::new("region-agent", node.name(), agent.port())))
            .collect();
        monitoring.watch(&targets, Some(rabbitmq.metrics_port())).unwrap();
        // Beside those: RabbitMQ twice, the MQTT broker, the machine, Prometheus itself.
        let exported = servers.postgres.len() + servers.redis.len() + servers.sentinels.len();
        let targets = targets.len() + exported + 5;
        Self {
            monitoring,
            targets,
            programs,
            agents,
            _redis: redis,
            _mosquitto: mosquitto,
            _rabbitmq: rabbitmq,
            cluster,
            _scratch: scratch,
        }
    }

    /// Into the standby, as dashboards do.
    pub(super) async fn reader(&self) -> Db {
        self.cluster.nodes[1].connect(Role::Reader).await.unwrap()
    }

    pub(super) async fn stop(self) {
        let Self { monitoring, programs, agents, .. } = self;
        monitoring.stop().await.unwrap();
        for mut program in programs.into_iter().rev().chain(agents) {
            program.terminate(READY).await.unwrap();
        }
    }
}

/// The nodes' data; their agents start them.
async fn cluster(scratch: &Scratch) -> Cluster {
    let mut cluster = Cluster::start(scratch, Options::default()).await.unwrap();
    let mut db = cluster.connect(Role::Owner).await.unwrap();
    ingest::schema::migrate(&mut db).await.unwrap();
    ingest::registry::fill(&db).await.unwrap();
    drop(db);
    cluster.stop().await.unwrap();
    cluster
}

fn postgres(node: &playground::postgres::Postgres) -> PostgresAt {
    PostgresAt {
        name: node.name().into(),
        port: node.port(),
        user: Role::Monitor.name().into(),
        password: node.passwords().of(Role::Monitor).into(),
        database: DATABASE.into(),
    }
}

fn agent(scratch: &Scratch, cluster: &Cluster, index: usize) -> Launch {
    let node = &cluster.nodes[index];
    let passwords = node.passwords();
    Launch::new("region-agent")
        .named(&format!("agent-{}", node.name()))
        .set("region_agent.node", node.name())
        .set("region_agent.data", node.data().display())
        .set("region_agent.state", scratch.path().join(format!("{}-agent", node.name())).display())
        .set("region_agent.bin", shipped::postgres_bin().unwrap().display())
        .set("region_agent.postgres_log", node.log().display())
        .set("region_agent.port", node.port())
        .set("region_agent.password", passwords.of(Role::Admin))
        .set("region_agent.replication_password", passwords.of(Role::Replicator))
        .set("region_agent.token", AGENT_TOKEN)
}

fn orchestrator(scratch: &Scratch, cluster: &Cluster, agents: &[Program]) -> Launch {
    let nodes =
        cluster.nodes.iter().zip(agents).map(|(node, agent)| {
            format!("{}=127.0.0.1:{}/127.0.0.1:{}", node.name(), node.port(), agent.port())
        });
    Launch::new("failover-orchestrator")
        .set("orchestrator.dir", scratch.path().join("orchestrator").display())
        .set("orchestrator.nodes", nodes.collect::<Vec<_>>().join(","))
        .set("orchestrator.token", TOKEN)
        .set("orchestrator.agent_token", AGENT_TOKEN)
        .set("orchestrator.monitor_password", cluster.primary().passwords().of(Role::Monitor))
}
