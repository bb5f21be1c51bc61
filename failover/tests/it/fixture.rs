//! Two or three regions with their agents, and an orchestrator.

use std::time::Duration;

use failover::orchestrator::report::{HistoryReport, Report, Status};
use ingest::settings::DatabaseSettings;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use playground::cluster::{Cluster, Options};
use playground::port::Port;
use playground::postgres::{Db, Role};
use playground::program::{Launch, Program};
use playground::redis::Redis;
use playground::scratch::Scratch;
use playground::shipped;
use reqwest::{Client, Method};
use serde::de::DeserializeOwned;
use serde_json::Value;
use service::secret::Secret;
use tokio::time::{Instant, sleep};

pub(crate) const TOKEN: &str = "a-token-for-people-0123456789";
pub(crate) const AGENT_TOKEN: &str = "a-token-for-agents-0123456789";
const LIMIT: Duration = Duration::from_secs(60);

/// Everything, running. Fields are dropped in this order.
pub(crate) struct Fixture {
    pub(crate) orchestrator: Program,
    pub(crate) agents: Vec<Program>,
    pub(crate) cluster: Cluster,
    pub(crate) redis: Option<Redis>,
    pub(crate) http: Client,
    launch: Launch,
    pub(crate) scratch: Scratch,
}

/// What differs from test to test.
#[derive(Default)]
pub(crate) struct Setup {
    three: bool,
    redis: bool,
    settings: Vec<(&'static str, String)>,
}

impl Setup {
    pub(crate) fn three_nodes(mut self) -> Self {
        self.three = true;
        self
    }

    pub(crate) fn with_redis(mut self) -> Self {
        self.redis = true;
        self
    }

    pub(crate) fn set(mut self, key: &'static str, value: &str) -> Self {
        self.settings.push((key, value.into()));
        self
    }

    pub(crate) async fn start(self) -> Fixture {
        let scratch = Scratch::new().unwrap();
        let standbys = if self.three { 2 } else { 1 };
        let options = Options { standbys, ..Options::default() }.set("wal_receiver_timeout", "1s");
        let mut cluster = Cluster::start(&scratch, options).await.unwrap();
        cluster.stop().await.unwrap();
        let mut agents = Vec::new();
        for index in 0..=standbys {
            agents.push(
                agent(&scratch, &cluster, index)
                    .start_on(scratch.path(), Port::free().unwrap())
                    .await
                    .unwrap(),
            );
        }
        let nodes: Vec<String> = cluster
            .nodes
            .iter()
            .zip(&agents)
            .map(|(node, agent)| {
                format!("{}=127.0.0.1:{}/127.0.0.1:{}", node.name(), node.port(), agent.port())
            })
            .collect();
        let mut launch = Launch::new("failover-orchestrator")
            .set("orchestrator.dir", scratch.path().join("orchestrator").display())
            .set("orchestrator.nodes", nodes.join(","))
            .set("orchestrator.token", TOKEN)
            .set("orchestrator.agent_token", AGENT_TOKEN)
            .set("orchestrator.monitor_password", cluster.primary().passwords().of(Role::Monitor))
            .set("log.filter", "info,failover=debug");
        for (key, value) in &self.settings {
            launch = launch.set(key, value);
        }
        let redis = if self.redis { Some(Redis::start(&scratch).await.unwrap()) } else { None };
        launch = launch.envs(redis.iter().flat_map(Redis::environment));
        let mut orchestrator = launch.clone().start(scratch.path()).await.unwrap();
        orchestrator.ready(LIMIT).await.unwrap();
        let http = Client::builder().no_proxy().build().unwrap();
        let fixture = Fixture { orchestrator, agents, cluster, redis, http, launch, scratch };
        fixture.whole().await;
        fixture
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
        .set("log.filter", "info,failover=debug")
}

impl Fixture {
    pub(crate) fn database(&self) -> DatabaseSettings {
        let hosts: Vec<String> =
            self.cluster.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        DatabaseSettings {
            hosts: hosts.join(","),
            password: Secret::new(self.cluster.primary().passwords().of(Role::Owner)),
            connect_timeout: Duration::from_millis(500),
            commit_timeout: Duration::from_secs(1),
            ..DatabaseSettings::default()
        }
    }

    /// Another orchestrator with the same settings and directory.
    pub(crate) fn launch(&self) -> Launch {
        self.launch.clone()
    }

    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Option<Value>,
    ) -> (u16, Value) {
        self.call_with(method, path, token, body, &[]).await
    }

    pub(crate) async fn call_with(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Option<Value>,
        headers: &[(&str, &str)],
    ) -> (u16, Value) {
        let url = format!("http://127.0.0.1:{}{path}", self.orchestrator.port());
        let mut request = self.http.request(method, url).timeout(LIMIT);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_str(&response.text().await.unwrap()).unwrap_or(Value::Null))
    }

    pub(crate) async fn failover(&self, region: &str, query: &str) -> (u16, Value) {
        self.call(Method::POST, &format!("/failover/{region}{query}"), Some(TOKEN), None).await
    }

    /// A failover that has to succeed.
    pub(crate) async fn switch(&self, region: &str) -> Report {
        let (status, body) = self.failover(region, "").await;
        assert_eq!(status, 200, "{body:#}");
        serde_json::from_value(body).unwrap()
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Option<T> {
        let url = format!("http://127.0.0.1:{}{path}", self.orchestrator.port());
        let response = self.http.get(url).timeout(Duration::from_secs(5)).send().await.ok()?;
        if !response.status().is_success() {
            return None;
        }
        Some(response.json().await.unwrap())
    }

    pub(crate) async fn status(&self) -> Status {
        self.get("/status").await.unwrap()
    }

    pub(crate) async fn history(&self) -> HistoryReport {
        self.get("/history?verify=true").await.unwrap()
    }

    /// Waits until the status fulfils a condition.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status: Option<Status> = self.get("/status").await;
            if let Some(status) = &status
                && condition(status)
            {
                return status.clone();
            }
            assert!(
                Instant::now() < deadline,
                "not {what} within {LIMIT:?}: {status:#?}{}",
                playground::child::tail(self.orchestrator.log(), 60)
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Every standby holds everything, and nothing is under way.
    pub(crate) async fn whole(&self) -> Status {
        let others = self.agents.len() - 1;
        self.until("whole", |status| {
            status.sync_set.len() == others
                && !status.failover_under_way
                && status.primary_condition == "alive"
        })
        .await
    }

    pub(crate) fn index(&self, region: &str) -> usize {
        self.cluster.nodes.iter().position(|node| node.name() == region).unwrap()
    }

    /// SIGKILL for the postmaster alone, as the kernel's out-of-memory killer does.
    pub(crate) fn kill_postmaster(&self, region: &str) {
        kill(self.postmaster(region), Signal::SIGKILL).unwrap();
    }

    pub(crate) fn postmaster(&self, region: &str) -> Pid {
        let file = self.cluster.nodes[self.index(region)].data().join("postmaster.pid");
        let text = std::fs::read_to_string(file).unwrap();
        Pid::from_raw(text.lines().next().unwrap().trim().parse().unwrap())
    }

    /// The agent and its Postgres, at one stroke.
    pub(crate) async fn kill_node(&mut self, region: &str) {
        let index = self.index(region);
        self.agents[index].kill9().await.unwrap();
    }

    pub(crate) async fn revive_node(&mut self, region: &str) {
        let index = self.index(region);
        self.agents[index].restart().await.unwrap();
    }

    pub(crate) async fn admin(&self, region: &str) -> Db {
        self.cluster.nodes[self.index(region)].admin().await.unwrap()
    }

    /// Nodes that accept writes now. Looked at directly, not through the orchestrator.
    pub(crate) async fn writable(&self) -> Vec<String> {
        let mut writable = Vec::new();
        for node in &self.cluster.nodes {
            let Ok(db) = node.admin().await else { continue };
            let recovers: bool = db.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get(0);
            if !recovers {
                writable.push(node.name().to_owned());
            }
        }
        writable
    }
}
