//! Section `[user_simulator]`: how many users, how often, with what trouble.

use std::path::PathBuf;
use std::time::Duration;

use amqp::Broker;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::http::HttpSettings;
use service::logs::LogSettings;
use service::settings::Settings;

use super::trouble::TroubleSettings;
use crate::device::settings::Rate;

/// What `user-simulator` reads.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UserSimulatorSettings {
    pub log: LogSettings,
    pub http: HttpSettings,
    pub rabbitmq: Broker,
    pub user_simulator: UserSettings,
}

/// The simulated users: number and rate.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UserSettings {
    /// Number of users, numbered from 0. They are distributed over the ten sites.
    pub users: u32,
    /// Messages per second, or `max`: as fast as the broker confirms them. The speed of the users' activity
    /// follows the rate.
    pub rate: Rate,
    /// The same seed gives the same users, activity and faults.
    pub seed: u64,
    /// Maximum number of unconfirmed messages.
    pub max_in_flight: usize,
    /// Interval between publishing steps.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub tick: Duration,
    /// Messages that were due longer ago than this are skipped and counted.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_behind: Duration,
    /// Stop after this time, counted from the first connection.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "Option<String>", extend("format" = "time"), example = &"60s")]
    pub run_for: Option<Duration>,
    /// Stop after this many messages.
    #[schemars(example = 1_000_000)]
    pub count: Option<u64>,
    /// Path of the ledger.
    #[schemars(extend("format" = "path"), example = &"sessions.json")]
    pub ledger: Option<PathBuf>,
    /// Interval at which the ledger is also written during the run.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub ledger_every: Duration,
    /// Path of the final summary, as JSON.
    #[schemars(extend("format" = "path"), example = &"summary.json")]
    pub summary: Option<PathBuf>,
    /// Maximum time to wait for outstanding confirms at the end.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub grace: Duration,
    /// Maximum time between two attempts to connect.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_backoff: Duration,
    pub trouble: TroubleSettings,
}

impl Default for UserSettings {
    fn default() -> Self {
        Self {
            users: 1000,
            rate: Rate::PerSecond(100.0),
            seed: 1,
            max_in_flight: 2000,
            tick: Duration::from_millis(10),
            max_behind: Duration::from_secs(5),
            run_for: None,
            count: None,
            ledger: None,
            ledger_every: Duration::from_secs(10),
            summary: None,
            grace: Duration::from_secs(10),
            max_backoff: Duration::from_secs(2),
            trouble: TroubleSettings::default(),
        }
    }
}

impl UserSettings {
    /// `None` is as fast as they are taken.
    #[must_use]
    pub fn messages_per_second(&self) -> Option<f64> {
        match self.rate {
            Rate::Max => None,
            Rate::PerSecond(rate) => Some(rate),
        }
    }
}

impl Settings for UserSimulatorSettings {
    const SECTIONS: &'static [&'static str] = &["log", "http", "rabbitmq", "user_simulator"];

    fn check(&self) -> Result<(), String> {
        self.log.check()?;
        self.rabbitmq.check()?;
        let users = &self.user_simulator;
        let key = |name: &str, problem: &str| Err(format!("user_simulator.{name} {problem}"));
        if !(1..=1_000_000).contains(&users.users) {
            return key("users", "must be 1 to 1000000");
        }
        if users.count == Some(0) {
            return key("count", "must be at least 1");
        }
        if !(1..=100_000).contains(&users.max_in_flight) {
            return key("max_in_flight", "must be 1 to 100000");
        }
        if users.tick < Duration::from_millis(1) || users.tick > Duration::from_secs(1) {
            return key("tick", "must be 1ms to 1s");
        }
        for (name, time) in [
            ("max_behind", users.max_behind),
            ("ledger_every", users.ledger_every),
            ("max_backoff", users.max_backoff),
        ] {
            if time < Duration::from_millis(100) {
                return key(name, "must be at least 100ms");
            }
        }
        users.trouble.check().map_err(|problem| format!("user_simulator.trouble{problem}"))
    }
}
