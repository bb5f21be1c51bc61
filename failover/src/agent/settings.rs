//! Section `[region_agent]`.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::http::HttpSettings;
use service::logs::LogSettings;
use service::secret::Secret;
use service::settings::Settings;

use crate::token;

/// What `region-agent` reads.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AgentSettings {
    pub log: LogSettings,
    pub http: HttpSettings,
    pub region_agent: RegionAgent,
}

/// The agent of each Postgres, which is its parent process.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RegionAgent {
    /// Name of this node. It is also its region, its slot and its `application_name`.
    pub node: String,
    /// Data directory of Postgres, owned by `account`.
    #[schemars(extend("format" = "path"))]
    pub data: PathBuf,
    /// Directory for the agent's own state, which must survive a rebuild of the data directory.
    #[schemars(extend("format" = "path"))]
    pub state: PathBuf,
    /// Directory of Postgres' programs.
    #[schemars(extend("format" = "path"))]
    pub bin: PathBuf,
    /// File for the postmaster's standard error.
    #[schemars(extend("format" = "path"))]
    pub postgres_log: PathBuf,
    /// Account that runs Postgres when the agent is root; ignored otherwise.
    pub account: String,
    /// Address at which the agent reaches its Postgres.
    pub host: String,
    /// Port of its Postgres.
    pub port: u16,
    /// A superuser of this Postgres.
    pub user: String,
    /// Its password; must be set.
    pub password: Secret,
    /// Role that streams WAL, and that `pg_rewind` uses to read.
    pub replication_user: String,
    /// Its password; must be set.
    pub replication_password: Secret,
    /// Token that the orchestrator sends with each request. At least 16 characters; no default.
    pub token: Secret,
    /// Interval between status queries to Postgres.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub sample_every: Duration,
    /// Interval at which the primary commits a marker, which makes a loss detectable.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub mark_every: Duration,
    /// Maximum time for a fast stop of Postgres when the agent is asked to end.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub grace: Duration,
}

impl Default for RegionAgent {
    fn default() -> Self {
        Self {
            node: "region1".into(),
            data: "/var/lib/tier0/region1".into(),
            state: "/var/lib/tier0/region1-agent".into(),
            bin: "/usr/lib/postgresql/15/bin".into(),
            postgres_log: "/var/log/tier0/region1.log".into(),
            account: "postgres".into(),
            host: "127.0.0.1".into(),
            port: 5432,
            user: "postgres".into(),
            password: Secret::default(),
            replication_user: "replicator".into(),
            replication_password: Secret::default(),
            token: Secret::default(),
            sample_every: Duration::from_millis(50),
            mark_every: Duration::from_millis(250),
            grace: Duration::from_secs(60),
        }
    }
}

impl Settings for AgentSettings {
    const SECTIONS: &'static [&'static str] = &["log", "http", "region_agent"];

    fn check(&self) -> Result<(), String> {
        self.log.check()?;
        let agent = &self.region_agent;
        token::check("region_agent.token", &agent.token)?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if agent.node.is_empty() || agent.node.len() > 60 || !agent.node.chars().all(plain) {
            return Err("region_agent.node must be lower-case letters, digits and _ (it names a slot)".into());
        }
        for (key, value) in
            [("password", &agent.password), ("replication_password", &agent.replication_password)]
        {
            if value.is_empty() {
                return Err(format!("region_agent.{key} must be set"));
            }
        }
        if agent.sample_every.is_zero() || agent.mark_every.is_zero() {
            return Err("region_agent.sample_every and mark_every must be above 0".into());
        }
        Ok(())
    }
}
