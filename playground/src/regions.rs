//! Regions that fail over: an agent beside each node of a cluster, the orchestrator, Redis with its Sentinels.
//!
//! From [`Regions::start`] on the agents are the parents of the cluster's Postgres nodes, and who is primary is for the
//! orchestrator to say. The tokens are made anew for each playground and lie in files that only we can read; there is
//! no default one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use failover_api::{HistoryReport, NodeReport, Status};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::account::private_file;
use crate::child::{POLL, tail};
use crate::cluster::Cluster;
use crate::link::Link;
use crate::port::Port;
use crate::postgres::{Postgres, Role, random_word};
use crate::program::{Launch, Program};
use crate::redis::Redis;
use crate::{http, shipped};

const READY: Duration = Duration::from_secs(120);
/// A fast stop of Postgres, with its checkpoint.
const GRACE: Duration = Duration::from_secs(90);
/// An operation that is carried out answers when it is through.
const ANSWER: Duration = Duration::from_secs(180);

/// Where everything listens; `None`: any free port.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub agents: [u16; 3],
    pub orchestrator: u16,
    /// Two instances, then three Sentinels.
    pub redis: [u16; 5],
}

/// The contract's ports.
pub const CONTRACT: Wanted =
    Wanted { agents: [8101, 8102, 8103], orchestrator: 8003, redis: [6379, 6380, 26379, 26380, 26381] };

/// What differs from playground to playground.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    pub ports: Option<Wanted>,
    pub redis: bool,
    /// The orchestrator reaches the agents through links that can be cut.
    pub linked: bool,
    /// Settings of the orchestrator.
    pub settings: Vec<(String, String)>,
}

/// The programs. Fields are dropped in this order.
#[derive(Debug)]
pub struct Regions {
    pub orchestrator: Program,
    /// In the order of the cluster's nodes.
    pub agents: Vec<Program>,
    pub redis: Option<Redis>,
    pub links: Vec<Link>,
    launch: Launch,
    dir: PathBuf,
}

impl Regions {
    /// Starts everything around a cluster that is stopped, and waits until there is a primary.
    ///
    /// # Errors
    /// When a program does not come up; the message holds the end of its log.
    pub async fn start(dir: &Path, cluster: &mut Cluster, plan: Plan) -> anyhow::Result<Self> {
        let (people, agents_only) = (token_file(dir), dir.join("agent-token"));
        for path in [&people, &agents_only] {
            if !path.exists() {
                private_file(path, &format!("{}{}", random_word()?, random_word()?), None)?;
            }
        }
        let master = cluster.nodes.iter().position(|node| node.name() == cluster.primary().name());
        let redis = async {
            if !plan.redis {
                return anyhow::Ok(None);
            }
            let ports = (0..5).map(|index| port(plan.ports.map(|ports| ports.redis), index));
            let ports = ports.collect::<anyhow::Result<_>>()?;
            Ok(Some(Redis::open(dir, ports, master.unwrap_or(0)).await?))
        };
        let agents = async {
            let mut agents = Vec::new();
            for (index, node) in cluster.nodes.iter().enumerate() {
                let port = port(plan.ports.map(|ports| ports.agents), index)?;
                agents.push(agent(dir, node, &agents_only)?.start_on(dir, port).await?);
            }
            anyhow::Ok(agents)
        };
        let (redis, agents) = tokio::try_join!(redis, agents)?;
        let mut links = Vec::new();
        if plan.linked {
            for agent in &agents {
                links.push(Link::open(agent.port()).await?);
            }
        }
        let reached = agents.iter().enumerate();
        let reached = reached.map(|(index, agent)| links.get(index).map_or(agent.port(), Link::port));
        let nodes: Vec<String> = cluster
            .nodes
            .iter()
            .zip(reached)
            .map(|(node, agent)| format!("{}=127.0.0.1:{}/127.0.0.1:{agent}", node.name(), node.port()))
            .collect();
        let mut launch = Launch::new("failover-orchestrator")
            .set("orchestrator.dir", dir.join("orchestrator").display())
            .set("orchestrator.nodes", nodes.join(","))
            .set("orchestrator.token_file", people.display())
            .set("orchestrator.agent_token_file", agents_only.display())
            .set("orchestrator.monitor_user", Role::Monitor.name())
            .set("orchestrator.monitor_password", cluster.primary().passwords().of(Role::Monitor))
            .envs(redis.iter().flat_map(Redis::environment));
        for (key, value) in &plan.settings {
            launch = launch.set(key, value);
        }
        let orchestrator =
            launch.clone().start_on(dir, port(plan.ports.map(|ports| [ports.orchestrator]), 0)?).await?;
        let mut regions = Self { orchestrator, agents, redis, links, launch, dir: dir.to_owned() };
        regions.orchestrator.ready(READY).await?;
        let status = regions.until("asked who leads", READY, |_| true).await?;
        cluster.led_by(&status.current_region)?;
        Ok(regions)
    }

    /// Ends the orchestrator first: nobody is to fail over because we stop.
    ///
    /// # Errors
    /// When something does not end in order; the rest is ended all the same.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let mut outcome = self.orchestrator.terminate(GRACE).await;
        // The primary before its standby, which then has everything it wrote.
        let primary = crate::cluster::recorded(&self.dir).and_then(|name| {
            let wanted = format!("agent-{name}");
            self.agents.iter().position(|agent| agent.name() == wanted)
        });
        if let Some(agent) = primary.and_then(|index| self.agents.get_mut(index)) {
            outcome = outcome.and(agent.terminate(GRACE).await);
        }
        for agent in &mut self.agents {
            outcome = outcome.and(agent.terminate(GRACE).await);
        }
        if let Some(redis) = &mut self.redis {
            outcome = outcome.and(redis.stop().await);
        }
        outcome
    }

    /// Another orchestrator with the same settings and directory.
    #[must_use]
    pub fn launch(&self) -> Launch {
        self.launch.clone()
    }

    /// The token that lets people change something.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn token(&self) -> anyhow::Result<String> {
        read_token(&self.dir)
    }

    /// # Errors
    /// When the orchestrator does not answer.
    pub async fn status(&self) -> anyhow::Result<Status> {
        status_at(self.orchestrator.port()).await
    }

    /// # Errors
    /// When the orchestrator does not answer.
    pub async fn history(&self) -> anyhow::Result<HistoryReport> {
        let (code, body) = http::get(self.orchestrator.port(), "/history?verify=true").await?;
        if code != 200 {
            bail!("the orchestrator answered {code}: {body}");
        }
        serde_json::from_str(&body).context("understand the history")
    }

    /// Waits until the status fulfils a condition.
    ///
    /// # Errors
    /// When it does not within `limit`; the message holds the last status and the end of the log.
    pub async fn until(
        &self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Status) -> bool,
    ) -> anyhow::Result<Status> {
        self.until_since(what, limit, |status, _| condition(status)).await
    }

    /// As [`Regions::until`]; the condition is also given how long after the call the orchestrator was asked.
    async fn until_since(
        &self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Status, Duration) -> bool,
    ) -> anyhow::Result<Status> {
        let called = Instant::now();
        let deadline = called + limit;
        loop {
            let asked = called.elapsed();
            let status = self.status().await;
            if let Ok(status) = &status
                && condition(status, asked)
            {
                return Ok(status.clone());
            }
            if Instant::now() > deadline {
                bail!("not {what} within {limit:?}: {status:#?}{}", tail(self.orchestrator.log(), 40));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until every standby holds everything and nothing is under way.
    ///
    /// # Errors
    /// As [`Regions::until`].
    pub async fn whole(&self, limit: Duration) -> anyhow::Result<Status> {
        let others = self.agents.len() - 1;
        self.until_since("whole", limit, |status, lately| is_whole(status, others, lately)).await
    }

    /// Makes a region the primary; the answer's status and body.
    ///
    /// # Errors
    /// When the orchestrator does not answer.
    pub async fn failover(&self, region: &str, query: &str) -> anyhow::Result<(u16, String)> {
        let path = format!("/failover/{region}{query}");
        http::post(self.orchestrator.port(), &path, &self.token()?, "", ANSWER).await
    }

    /// The agent of a region.
    ///
    /// # Errors
    /// When there is none.
    pub fn agent(&mut self, region: &str) -> anyhow::Result<&mut Program> {
        let name = format!("agent-{region}");
        let found = self.agents.iter_mut().find(|agent| agent.name() == name);
        found.with_context(|| format!("there is no agent of {region}"))
    }

    /// Starts again what has ended, as a service manager would; says what it was.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn restart_ended(&mut self) -> anyhow::Result<Vec<String>> {
        let mut restarted = Vec::new();
        for program in self.agents.iter_mut().chain([&mut self.orchestrator]) {
            if !program.is_running() {
                program.restart().await?;
                restarted.push(program.name().to_owned());
            }
        }
        if let Some(redis) = &mut self.redis {
            for server in redis.instances.iter_mut().chain(&mut redis.sentinels) {
                if !server.is_running() {
                    server.start_again().await?;
                    restarted.push(server.name().to_owned());
                }
            }
        }
        Ok(restarted)
    }
}

/// Whether every one of `others` standbys streams and holds everything and nothing is under way, by what agents said within
/// `lately`: what was heard before somebody was killed says nothing of what is now.
#[must_use]
pub fn is_whole(status: &Status, others: usize, lately: Duration) -> bool {
    let standbys =
        status.nodes.iter().filter(|node| node.role == failover_api::Role::Standby && node.streaming);
    let heard =
        |node: &NodeReport| node.agent_last_seen_ms.is_some_and(|ago| Duration::from_millis(ago) < lately);
    status.sync_set.len() == others
        && !status.failover_under_way
        && status.primary_condition == "alive"
        && standbys.count() == others
        && status.nodes.iter().all(heard)
}

/// What an orchestrator says.
///
/// # Errors
/// When it does not answer.
pub async fn status_at(port: u16) -> anyhow::Result<Status> {
    let (code, body) = http::get(port, "/status").await?;
    if code != 200 {
        bail!("the orchestrator answered {code}: {body}");
    }
    serde_json::from_str(&body).context("understand the status")
}

/// Where the token of a playground lies.
#[must_use]
pub fn token_file(dir: &Path) -> PathBuf {
    dir.join("failover-token")
}

/// # Errors
/// When it cannot be read.
pub fn read_token(dir: &Path) -> anyhow::Result<String> {
    let path = token_file(dir);
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.trim().to_owned())
}

/// SIGKILL for a postmaster alone, as the kernel's out-of-memory killer does.
///
/// # Errors
/// When it does not run.
pub fn kill_postmaster(node: &Postgres) -> anyhow::Result<()> {
    let pid = node.pid().with_context(|| format!("the postmaster of {} does not run", node.name()))?;
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill {pid}"))
}

fn port<const N: usize>(wanted: Option<[u16; N]>, index: usize) -> anyhow::Result<Port> {
    match wanted.and_then(|ports| ports.get(index).copied()) {
        Some(port) => Port::near(port),
        None => Port::free(),
    }
}

fn agent(dir: &Path, node: &Postgres, token: &Path) -> anyhow::Result<Launch> {
    let passwords = node.passwords();
    Ok(Launch::new("region-agent")
        .named(&format!("agent-{}", node.name()))
        .set("region_agent.node", node.name())
        .set("region_agent.data", node.data().display())
        .set("region_agent.state", dir.join(format!("{}-agent", node.name())).display())
        .set("region_agent.bin", shipped::postgres_bin()?.display())
        .set("region_agent.postgres_log", node.log().display())
        .set("region_agent.port", node.port())
        .set("region_agent.password", passwords.of(Role::Admin))
        .set("region_agent.replication_user", Role::Replicator.name())
        .set("region_agent.replication_password", passwords.of(Role::Replicator))
        .set("region_agent.token_file", token.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(streaming: bool, ago: u64) -> Status {
        let node = |region: &str, role: &str, streaming: bool| {
            json!({"region": region, "address": "h:1", "role": role, "timeline": 1, "lsn": "0/10", "lag_bytes": null, "lag_seconds": null,
                   "sync_state": "none", "streaming": streaming, "agent_last_seen_ms": ago, "postgres_last_seen_ms": ago})
        };
        serde_json::from_value(json!({
            "current_region": "region1", "primary_condition": "alive", "epoch": 1, "orchestrator": "o", "doubts": [], "writers_see": "region1",
            "mode": "auto", "copies": "available",
            "sync_set": ["region2"], "wait_for": ["region2"],
            "nodes": [node("region1", "primary", false), node("region2", "standby", streaming)],
            "redis": {"configured": false, "master": null, "region": null, "error": null}, "deployment_version": "1",
            "failover_count": 0, "failover_under_way": false, "last_failover": null, "alarms": []
        }))
        .unwrap()
    }

    #[test]
    fn whole_is_what_streams_and_was_heard_lately() {
        let lately = Duration::from_millis(50);
        assert!(is_whole(&status(true, 49), 1, lately));
        assert!(!is_whole(&status(false, 49), 1, lately), "in the set, but away");
        assert!(!is_whole(&status(true, 50), 1, lately), "heard before");
        assert!(!is_whole(&status(true, 49), 2, lately), "one is missing");
    }
}
