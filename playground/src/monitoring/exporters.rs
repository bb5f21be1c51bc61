//! The exporters: Debian's for Postgres (one for each node), Mosquitto, Redis with its Sentinels, and the machine.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::{Running, Target};
use crate::account::{Account, private_file};
use crate::child::Start;
use crate::cluster::Cluster;
use crate::port::Port;
use crate::postgres::{DATABASE, Role};
use crate::redis::{Redis, Server};
use crate::{http, shipped};

const READY: Duration = Duration::from_secs(30);
const NODE_PORT: u16 = 9100;
const REDIS_PORT: u16 = 9121;
const POSTGRES_PORT: u16 = 9187;
const MOSQUITTO_PORT: u16 = 9641;

/// The servers an exporter is wanted for.
#[derive(Debug, Clone)]
pub struct Servers {
    postgres: Vec<PostgresAt>,
    mosquitto: Option<u16>,
    /// Names and ports, Sentinels apart.
    redis: Vec<(String, u16)>,
    sentinels: Vec<(String, u16)>,
}

/// A node, and the password of the role that may look into it.
#[derive(Debug, Clone)]
struct PostgresAt {
    name: String,
    port: u16,
    password: String,
}

impl Servers {
    /// Every node of a cluster, the MQTT broker by its port, Redis with its Sentinels.
    #[must_use]
    pub fn of(cluster: &Cluster, mosquitto: Option<u16>, redis: Option<&Redis>) -> Self {
        let node = |node: &crate::postgres::Postgres| PostgresAt {
            name: node.name().into(),
            port: node.port(),
            password: node.passwords().of(Role::Monitor).into(),
        };
        let names = |servers: &[Server]| -> Vec<(String, u16)> {
            servers.iter().map(|server| (server.name().to_owned(), server.port())).collect()
        };
        Self {
            postgres: cluster.nodes.iter().map(node).collect(),
            mosquitto,
            redis: redis.map(|redis| names(&redis.instances)).unwrap_or_default(),
            sentinels: redis.map(|redis| names(&redis.sentinels)).unwrap_or_default(),
        }
    }
}

/// Starts them; returns what Prometheus is to scrape.
pub(super) async fn start(
    parent: &Path,
    dir: &Path,
    account: Option<&Account>,
    servers: &Servers,
) -> anyhow::Result<(Vec<Running>, Vec<Target>)> {
    let starter = Starter { parent, dir, account };
    let mut running = Vec::new();
    let mut targets = Vec::new();
    let node = starter.node().await?;
    targets.push(Target::new("node", "localhost", node.port.number()));
    running.push(node);
    for at in &servers.postgres {
        let exporter = starter.postgres(at).await?;
        targets.push(Target::new("postgres", &at.name, exporter.port.number()));
        running.push(exporter);
    }
    if let Some(at) = servers.mosquitto {
        let exporter = starter.mosquitto(at).await?;
        targets.push(Target::new("mosquitto", "mosquitto", exporter.port.number()));
        running.push(exporter);
    }
    if !servers.redis.is_empty() || !servers.sentinels.is_empty() {
        let exporter = starter.redis().await?;
        let port = exporter.port.number();
        for (job, list) in [("redis", &servers.redis), ("sentinel", &servers.sentinels)] {
            targets.extend(list.iter().map(|(name, at)| {
                Target::new(job, name, port)
                    .label("__metrics_path__", "/scrape")
                    .label("__param_target", format!("redis://127.0.0.1:{at}"))
            }));
        }
        running.push(exporter);
    }
    Ok((running, targets))
}

struct Starter<'a> {
    parent: &'a Path,
    dir: &'a Path,
    account: Option<&'a Account>,
}

impl Starter<'_> {
    async fn node(&self) -> anyhow::Result<Running> {
        let collectors = ["cpu", "filesystem", "loadavg", "meminfo", "diskstats"];
        let collectors = collectors.iter().map(|name| format!("--collector.{name}"));
        let args = |port: u16| {
            let listen = format!("--web.listen-address=127.0.0.1:{port}");
            [listen, "--collector.disable-defaults".into()].into_iter().chain(collectors).collect()
        };
        self.start("node-exporter", "prometheus-node-exporter", NODE_PORT, args, &[]).await
    }

    async fn postgres(&self, at: &PostgresAt) -> anyhow::Result<Running> {
        let queries = self.dir.join("postgres-queries.yml");
        private_file(&queries, &shipped::config("prometheus/postgres-queries.yml")?, self.account)?;
        let environment = [
            ("DATA_SOURCE_URI", format!("127.0.0.1:{}/{DATABASE}?sslmode=disable", at.port)),
            ("DATA_SOURCE_USER", Role::Monitor.name().to_owned()),
            ("DATA_SOURCE_PASS", at.password.clone()),
        ];
        let args = |port: u16| {
            vec![
                format!("--web.listen-address=127.0.0.1:{port}"),
                "--disable-settings-metrics".into(),
                format!("--extend.query-path={}", queries.display()),
                "--log.level=warn".into(),
            ]
        };
        let name = format!("postgres-exporter-{}", at.name);
        self.start(&name, "prometheus-postgres-exporter", POSTGRES_PORT, args, &environment).await
    }

    async fn mosquitto(&self, broker: u16) -> anyhow::Result<Running> {
        const SERVER: &str = "tcp://127.0.0.1:1883";
        let text = shipped::config("prometheus/mosquitto-exporter.yml")?;
        if !text.contains(SERVER) {
            anyhow::bail!("config/prometheus/mosquitto-exporter.yml does not name the server {SERVER}");
        }
        let config = self.dir.join("mosquitto-exporter.yml");
        let text = text.replace(SERVER, &format!("tcp://127.0.0.1:{broker}"));
        private_file(&config, &text, self.account)?;
        let args = |port: u16| {
            let port = port.to_string();
            let config = config.display().to_string();
            ["-config", &config, "-listen-address", "127.0.0.1", "-listen-port", &port, "-log-level", "error"]
                .map(str::to_owned)
                .to_vec()
        };
        self.start("mosquitto-exporter", "prometheus-mqtt-exporter", MOSQUITTO_PORT, args, &[]).await
    }

    async fn redis(&self) -> anyhow::Result<Running> {
        // No server of its own: each scrape names one.
        let args = |port: u16| {
            let listen = format!("127.0.0.1:{port}");
            ["-web.listen-address", &listen, "-redis.addr", ""].map(str::to_owned).to_vec()
        };
        self.start("redis-exporter", "prometheus-redis-exporter", REDIS_PORT, args, &[]).await
    }

    async fn start(
        &self,
        name: &str,
        program: &str,
        wanted: u16,
        args: impl FnOnce(u16) -> Vec<String>,
        environment: &[(&str, String)],
    ) -> anyhow::Result<Running> {
        let port = Port::near(wanted)?;
        let number = port.number();
        let log = self.parent.join(format!("{name}.log"));
        let start = Start::new(name, shipped::server(program)?, log)
            .account(self.account.cloned())
            .args(args(number));
        let start = environment.iter().fold(start, |start, (key, value)| start.env(*key, value));
        let mut child = start.spawn().await.with_context(|| format!("start {name}"))?;
        // Not its metrics: those would ask the server, which is no business of a start.
        child.until("answers", READY, || async { http::get(number, "/").await.map(drop) }).await?;
        Ok(Running { child, port })
    }
}
