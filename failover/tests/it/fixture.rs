//! Two or three regions with their agents, and an orchestrator.

use std::time::Duration;

use anyhow::Context;
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
use reqwest::{Client, Method, RequestBuilder, Response};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use service::secret::Secret;
use tokio::time::{Instant, sleep};
use tokio_postgres::types::FromSqlOwned;

pub(crate) const TOKEN: &str = "a-token-for-people-0123456789";
pub(crate) const AGENT_TOKEN: &str = "a-token-for-agents-0123456789";
/// For everything that has to happen: tests share the machine with whatever else runs.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

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

/// Asks until there is an answer. An error is none: the server may be starting, or end its sessions because its role changes.
pub(crate) async fn answered<T>(what: &str, ask: impl AsyncFn() -> anyhow::Result<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => {
                assert!(Instant::now() < deadline, "{what}: no answer within {LIMIT:?}: {error:#}");
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Sends it once. Whoever is not reached, because it is only just starting, has not got it.
async fn send(request: RequestBuilder) -> Response {
    let deadline = Instant::now() + LIMIT;
    loop {
        match request.try_clone().unwrap().send().await {
            Ok(response) => return response,
            Err(error) if error.is_connect() && Instant::now() < deadline => {}
            Err(error) => panic!("{error:?}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
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
        // A connection of before a restart is of no use after it.
        let http = Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
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
        let response = send(request).await;
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

    async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let url = format!("http://127.0.0.1:{}{path}", self.orchestrator.port());
        let response = self.http.get(url).timeout(Duration::from_secs(20)).send().await?;
        response.error_for_status()?.json().await.context("understand the answer")
    }

    pub(crate) async fn status(&self) -> Status {
        answered("status", async || self.get("/status").await).await
    }

    pub(crate) async fn history(&self) -> HistoryReport {
        answered("history", async || self.get("/history?verify=true").await).await
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
            let status: anyhow::Result<Status> = self.get("/status").await;
            if let Ok(status) = &status
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
        let response = send(request).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// What an agent says.
    pub(crate) async fn agent(&self, region: &str) -> NodeStatus {
        let url = format!("http://127.0.0.1:{}/v1/status", self.agents[self.index(region)].port());
        answered(region, async || {
            let request = self.http.get(&url).bearer_auth(AGENT_TOKEN).timeout(Duration::from_secs(20));
            let response = request.send().await?.error_for_status()?;
            response.json().await.context("understand the answer")
        })
        .await
    }

    /// Waits until an agent says so.
    pub(crate) async fn agent_until(&self, region: &str, what: &str, says: impl Fn(&NodeStatus) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.agent(region).await;
            if says(&status) {
                return;
            }
            assert!(Instant::now() < deadline, "{region}: not {what} within {LIMIT:?}: {status:#?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn upstream(&self, region: &str) -> Value {
        json!({"host": "127.0.0.1", "port": self.cluster.nodes[self.index(region)].port()})
    }

    pub(crate) async fn restart_node(&mut self, region: &str) {
        let index = self.index(region);
        self.agents[index].restart().await.unwrap();
    }

    pub(crate) async fn admin(&self, region: &str) -> Db {
        answered(region, async || self.cluster.nodes[self.index(region)].admin().await).await
    }

    /// The one value that a query finds there, in a session of its own.
    pub(crate) async fn ask<T: FromSqlOwned>(&self, region: &str, sql: &str) -> T {
        answered(sql, async || {
            let db = self.cluster.nodes[self.index(region)].admin().await?;
            Ok(db.query_one(sql, &[]).await?.try_get(0)?)
        })
        .await
    }

    /// Nodes that accept writes now. Looked at directly, not through the orchestrator.
    pub(crate) async fn writable(&self) -> Vec<String> {
        self.cluster.writable().await
    }

    /// This node accepts writes, and no other one does.
    pub(crate) async fn leads_alone(&self, region: &str) {
        self.cluster.leads_alone(region, LIMIT).await.unwrap();
    }
}
