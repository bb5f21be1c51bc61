//! Two or three regions with their agents, and an orchestrator.

use std::time::Duration;

use failover::protocol::NodeStatus;
use failover_api::{HistoryReport, Report, Status};
use ingest::settings::DatabaseSettings;
use nix::unistd::Pid;
use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role};
use playground::program::{Launch, Program};
use playground::redis::Redis;
use playground::regions::{Plan, Regions, is_whole, kill_postmaster};
use playground::scratch::Scratch;
use reqwest::{Client, Method};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
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
        let options = Options { standbys, ..Options::default() };
        let mut cluster = Cluster::start(&scratch, options).await.unwrap();
        cluster.hand_over().await.unwrap();
        // Known to the tests; a playground makes its own.
        for (name, token) in [("failover-token", TOKEN), ("agent-token", AGENT_TOKEN)] {
            std::fs::write(scratch.path().join(name), token).unwrap();
        }
        let mut settings = vec![("log.filter".to_owned(), "info,failover=debug".to_owned())];
        settings.extend(self.settings.into_iter().map(|(key, value)| (key.to_owned(), value)));
        let plan = Plan { redis: self.redis, settings, ..Plan::default() };
        let regions = Regions::start(scratch.path(), &mut cluster, plan).await.unwrap();
        let launch = regions.launch();
        let Regions { orchestrator, agents, mut redis, .. } = regions;
        if let Some(redis) = &mut redis {
            redis.settled(LIMIT).await.unwrap();
        }
        let http = Client::builder().no_proxy().build().unwrap();
        let fixture = Fixture { orchestrator, agents, cluster, redis, http, launch, scratch };
        fixture.whole().await;
        fixture
    }
}

impl Fixture {
    pub(crate) fn database(&self) -> DatabaseSettings {
        let hosts: Vec<String> =
            self.cluster.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        DatabaseSettings {
            hosts: hosts.join(","),
            password: Secret::new(self.cluster.primary().passwords().of(Role::Owner)),
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

    /// A person gives up the data of a region that is kept.
    pub(crate) async fn discard(&self, region: &str) {
        self.until("kept", |status| status.alarms.iter().any(|alarm| alarm.contains("POST /discard"))).await;
        let (status, body) =
            self.call(Method::POST, &format!("/discard/{region}?reason=test"), Some(TOKEN), None).await;
        assert_eq!(status, 200, "{body:#}");
        assert_eq!(body["kind"], json!("discarded"));
    }

    /// A person takes the world as it is for the truth.
    pub(crate) async fn adopt(&self, region: &str, query: &str) -> (u16, Value) {
        self.call(Method::POST, &format!("/adopt/{region}?{query}"), Some(TOKEN), None).await
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
        self.until_since(what, |status, _| condition(status)).await
    }

    /// The condition is also given how long after the call the orchestrator was asked.
    async fn until_since(&self, what: &str, condition: impl Fn(&Status, Duration) -> bool) -> Status {
        let called = Instant::now();
        let deadline = called + LIMIT;
        loop {
            let asked = called.elapsed();
            let status: Option<Status> = self.get("/status").await;
            if let Some(status) = &status
                && condition(status, asked)
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

    /// Every standby streams and holds everything, and nothing is under way: as seen after the call.
    pub(crate) async fn whole(&self) -> Status {
        let others = self.agents.len() - 1;
        self.until_since("whole", |status, lately| is_whole(status, others, lately)).await
    }

    pub(crate) fn index(&self, region: &str) -> usize {
        self.cluster.nodes.iter().position(|node| node.name() == region).unwrap()
    }

    /// SIGKILL for the postmaster alone, as the kernel's out-of-memory killer does.
    pub(crate) fn kill_postmaster(&self, region: &str) {
        kill_postmaster(&self.cluster.nodes[self.index(region)]).unwrap();
    }

    pub(crate) fn postmaster(&self, region: &str) -> Pid {
        self.started(region).unwrap()
    }

    /// None between the end of one and the start of the next.
    pub(crate) fn started(&self, region: &str) -> Option<Pid> {
        self.cluster.nodes[self.index(region)].pid().map(Pid::from_raw)
    }

    /// The agent and its Postgres, at one stroke.
    pub(crate) async fn kill_node(&mut self, region: &str) {
        let index = self.index(region);
        self.agents[index].kill9().await.unwrap();
    }

    /// Its disk is gone; a new one is in its place.
    pub(crate) fn empty_disk(&self, region: &str) {
        for entry in std::fs::read_dir(self.cluster.nodes[self.index(region)].data()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }.unwrap();
        }
    }

    /// An order as the orchestrator gives it, of the epoch that holds there.
    pub(crate) async fn order(&self, region: &str, what: Value) -> (u16, Value) {
        let NodeStatus { epoch, orchestrator, .. } = self.agent(region).await;
        let url = format!("http://127.0.0.1:{}/v1/orders", self.agents[self.index(region)].port());
        let body = json!({"orchestrator": orchestrator, "epoch": epoch, "limit_ms": 60_000, "what": what});
        let request = self.http.post(url).bearer_auth(AGENT_TOKEN).timeout(LIMIT).json(&body);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// What an agent says.
    pub(crate) async fn agent(&self, region: &str) -> NodeStatus {
        let url = format!("http://127.0.0.1:{}/v1/status", self.agents[self.index(region)].port());
        self.http.get(url).bearer_auth(AGENT_TOKEN).send().await.unwrap().json().await.unwrap()
    }

    pub(crate) fn upstream(&self, region: &str) -> Value {
        json!({"host": "127.0.0.1", "port": self.cluster.nodes[self.index(region)].port()})
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
        self.cluster.writable().await
    }
}
