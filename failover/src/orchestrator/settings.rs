//! Sections `[orchestrator]` and `[redis]`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use failover_api::{Copies, Node};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::http::HttpSettings;
use service::logs::LogSettings;
use service::secret::Secret;
use service::settings::Settings;
use service::traces::TraceSettings;

use crate::decide::Rules;
use crate::protocol::Upstream;
use crate::token;
use crate::view::Policy;

/// What `failover-orchestrator` reads.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OrchestratorSettings {
    pub log: LogSettings,
    pub http: HttpSettings,
    pub traces: TraceSettings,
    pub orchestrator: Orchestrator,
    pub redis: RedisSettings,
}

/// The nodes, and the tokens.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Orchestrator {
    /// Directory of state and history. Two orchestrators must not share one; the second refuses to start.
    #[schemars(extend("format" = "path"))]
    pub dir: PathBuf,
    /// All nodes: `name=POSTGRES_HOST:PORT/AGENT_HOST:PORT`, separated by commas.
    pub nodes: String,
    /// Primary to use when there is no state yet and the nodes' data does not determine it.
    pub first_primary: String,
    /// Token required for requests that change something. At least 16 characters; no default.
    pub token: Secret,
    /// Token that the orchestrator sends to the agents.
    pub agent_token: Secret,
    /// Role for the orchestrator's own probes. It must be able to log in to database `postgres` and needs no
    /// other rights.
    pub monitor_user: String,
    /// Its password.
    pub monitor_password: Secret,
    /// After a failover: acknowledge with one copy (`available`), or only when a standby has the commit too
    /// (`two_copies`).
    pub copies: Copies,
    pub policy: Policy,
    /// Interval at which each agent answers when nothing has changed.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub heartbeat: Duration,
    /// Interval of the orchestrator's own probes of each Postgres.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub probe_every: Duration,
    /// Maximum time for tasks to end.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub grace: Duration,
    /// Maximum number of requests per minute that change something.
    pub max_requests_per_minute: u32,
}

impl Default for Orchestrator {
    fn default() -> Self {
        Self {
            dir: "/var/lib/tier0/orchestrator".into(),
            nodes: "region1=127.0.0.1:5432/127.0.0.1:8101,region2=127.0.0.1:5433/127.0.0.1:8102".into(),
            first_primary: String::new(),
            token: Secret::default(),
            agent_token: Secret::default(),
            monitor_user: "monitor".into(),
            monitor_password: Secret::default(),
            copies: Copies::Available,
            policy: Policy::default(),
            heartbeat: Duration::from_millis(200),
            probe_every: Duration::from_millis(200),
            grace: Duration::from_secs(60),
            max_requests_per_minute: 120,
        }
    }
}

/// Redis behind Sentinel, which follows the region of the primary.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RedisSettings {
    /// `host:port` of each Sentinel, separated by commas. Empty: Redis is not used.
    pub sentinels: String,
    /// Name of the master in the Sentinels.
    pub master: String,
    /// The Redis instance of each region: `name=host:port`, separated by commas.
    pub instances: String,
    /// Password of Redis.
    pub password: Secret,
    /// Password of the Sentinels.
    pub sentinel_password: Secret,
}

impl Default for RedisSettings {
    fn default() -> Self {
        Self {
            sentinels: String::new(),
            master: "tier0".into(),
            instances: "region1=127.0.0.1:6379,region2=127.0.0.1:6380".into(),
            password: Secret::default(),
            sentinel_password: Secret::default(),
        }
    }
}

/// One node's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub postgres: Upstream,
    /// `host:port` of the agent.
    pub agent: String,
}

fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn host_port(text: &str) -> Option<Upstream> {
    let (host, port) = text.rsplit_once(':')?;
    (!host.is_empty()).then_some(Upstream { host: host.to_owned(), port: port.parse().ok()? })
}

impl Orchestrator {
    /// # Errors
    /// One sentence naming the key.
    pub fn addresses(&self) -> Result<BTreeMap<Node, Address>, String> {
        let mut addresses = BTreeMap::new();
        for part in split(&self.nodes) {
            let parse = || {
                let (name, rest) = part.split_once('=')?;
                let (postgres, agent) = rest.split_once('/')?;
                host_port(agent)?;
                Some((name.to_owned(), Address { postgres: host_port(postgres)?, agent: agent.to_owned() }))
            };
            let (name, address) = parse()
                .ok_or_else(|| format!("orchestrator.nodes: {part} is not name=HOST:PORT/AGENT_HOST:PORT"))?;
            if addresses.insert(name, address).is_some() {
                return Err(format!("orchestrator.nodes: {part} is there twice"));
            }
        }
        if addresses.len() < 2 {
            return Err("orchestrator.nodes must name at least two nodes".into());
        }
        Ok(addresses)
    }

    /// # Errors
    /// As [`Orchestrator::addresses`].
    pub fn rules(&self) -> Result<Rules, String> {
        let addresses =
            self.addresses()?.into_iter().map(|(node, address)| (node, address.postgres)).collect();
        Ok(Rules { policy: self.policy.clone(), copies: self.copies, addresses })
    }
}

impl RedisSettings {
    /// # Errors
    /// One sentence naming the key.
    pub fn sentinels(&self) -> Result<Vec<Upstream>, String> {
        split(&self.sentinels)
            .map(|part| host_port(part).ok_or_else(|| format!("redis.sentinels: {part} is not host:port")))
            .collect()
    }

    /// # Errors
    /// One sentence naming the key.
    pub fn instances(&self) -> Result<BTreeMap<Node, Upstream>, String> {
        split(&self.instances)
            .map(|part| {
                part.split_once('=')
                    .and_then(|(name, address)| Some((name.to_owned(), host_port(address)?)))
                    .ok_or_else(|| format!("redis.instances: {part} is not name=host:port"))
            })
            .collect()
    }
}

impl Settings for OrchestratorSettings {
    const SECTIONS: &'static [&'static str] = &["log", "http", "traces", "orchestrator", "redis"];

    fn check(&self) -> Result<(), String> {
        self.log.check()?;
        self.traces.check()?;
        let own = &self.orchestrator;
        token::check("orchestrator.token", &own.token)?;
        token::check("orchestrator.agent_token", &own.agent_token)?;
        if own.token == own.agent_token {
            return Err("orchestrator.token and orchestrator.agent_token must differ".into());
        }
        let addresses = own.addresses()?;
        if !own.first_primary.is_empty() && !addresses.contains_key(&own.first_primary) {
            return Err("orchestrator.first_primary is not among orchestrator.nodes".into());
        }
        if own.heartbeat.is_zero() || own.probe_every.is_zero() {
            return Err("orchestrator.heartbeat and probe_every must be above 0".into());
        }
        if own.policy.agent_silence < own.heartbeat * 2 || own.policy.probe_silence < own.probe_every * 2 {
            return Err(
                "orchestrator.policy.agent_silence and probe_silence must be at least twice heartbeat and probe_every"
                    .into(),
            );
        }
        self.redis.sentinels()?;
        self.redis.instances()?;
        Ok(())
    }
}
