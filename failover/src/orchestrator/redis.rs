//! Redis follows the region, through its Sentinels: they promote, we ask.
//!
//! Two moments are reported apart: the replica is master (clients that ask it can write), and the Sentinels say so
//! (clients that ask them find it), which has a fixed cost of about a second inside Sentinel.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::config::{Config, ConnectionConfig, PerformanceConfig, ServerConfig};
use fred::types::{ClusterHash, CustomCommand, Value};
use prometheus::IntGauge;
use service::secret::Secret;
use tokio::sync::watch as channel;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::orchestrator::report::{RedisReport, address};
use crate::orchestrator::settings::RedisSettings;
use crate::protocol::{Node, Upstream};

const LIMIT: Duration = Duration::from_millis(500);
/// Sentinel's own failover, its fixed second included.
const FAILOVER: Duration = Duration::from_secs(4);
const WATCH: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(10);

/// The Sentinels and what they watch.
#[derive(Debug, Clone)]
pub struct Redis {
    sentinels: Vec<Upstream>,
    instances: BTreeMap<Node, Upstream>,
    master: String,
    password: Secret,
    sentinel_password: Secret,
}

/// How a Redis failover went.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    pub to: Node,
    /// None when it was there already.
    pub is_master: Option<Duration>,
    pub sentinel_agrees: Option<Duration>,
}

impl Redis {
    /// `None` when no Sentinel is configured.
    ///
    /// # Errors
    /// When the settings are wrong.
    pub fn new(settings: &RedisSettings) -> anyhow::Result<Option<Self>> {
        let sentinels = settings.sentinels().map_err(anyhow::Error::msg)?;
        let instances = settings.instances().map_err(anyhow::Error::msg)?;
        Ok((!sentinels.is_empty()).then(|| Self {
            sentinels,
            instances,
            master: settings.master.clone(),
            password: settings.password.clone(),
            sentinel_password: settings.sentinel_password.clone(),
        }))
    }

    /// Where the master is, by the first Sentinel that answers.
    ///
    /// # Errors
    /// When none does.
    pub async fn master(&self) -> anyhow::Result<Upstream> {
        let mut failure = anyhow!("there is no Sentinel");
        for sentinel in &self.sentinels {
            match self.master_by(sentinel).await {
                Ok(master) => return Ok(master),
                Err(error) => {
                    failure = error.context(format!("Sentinel {}:{}", sentinel.host, sentinel.port))
                }
            }
        }
        Err(failure)
    }

    async fn master_by(&self, sentinel: &Upstream) -> anyhow::Result<Upstream> {
        let client = open(sentinel, &self.sentinel_password).await?;
        let answer = self.ask_master(&client).await;
        close(client).await;
        answer
    }

    async fn ask_master(&self, client: &Client) -> anyhow::Result<Upstream> {
        let answer = command(client, "SENTINEL", &["get-master-addr-by-name", &self.master]).await?;
        let pair: (String, u16) =
            answer.convert().with_context(|| format!("no master named {}", self.master))?;
        Ok(Upstream { host: pair.0, port: pair.1 })
    }

    /// The region the master is in.
    #[must_use]
    pub fn region(&self, master: &Upstream) -> Option<Node> {
        self.instances.iter().find(|(_, address)| *address == master).map(|(node, _)| node.clone())
    }

    /// Makes the Redis of `region` the master. Does nothing when it is.
    ///
    /// # Errors
    /// When it is not within 4 s; the message says how far it came.
    pub async fn follow(&self, region: &str) -> anyhow::Result<Moved> {
        let target =
            self.instances.get(region).with_context(|| format!("redis.instances has none in {region}"))?;
        let started = Instant::now();
        let deadline = started + FAILOVER;
        let mut failure = anyhow!("there is no Sentinel");
        for sentinel in &self.sentinels {
            let client = match open(sentinel, &self.sentinel_password).await {
                Ok(client) => client,
                Err(error) => {
                    failure = error.context(format!("Sentinel {}:{}", sentinel.host, sentinel.port));
                    continue;
                }
            };
            let moved = self.move_by(&client, target, started, deadline).await;
            close(client).await;
            match moved {
                Ok(times) => {
                    return Ok(Moved {
                        to: region.to_owned(),
                        is_master: times.map(|t| t.0),
                        sentinel_agrees: times.map(|t| t.1),
                    });
                }
                Err(error) => failure = error,
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(failure)
    }

    async fn move_by(
        &self,
        sentinel: &Client,
        target: &Upstream,
        started: Instant,
        deadline: Instant,
    ) -> anyhow::Result<Option<(Duration, Duration)>> {
        if self.ask_master(sentinel).await? == *target {
            return Ok(None);
        }
        // A failover that is under way already (the Sentinels saw the master die) is as good as ours.
        if let Err(error) = command(sentinel, "SENTINEL", &["failover", &self.master]).await
            && !format!("{error:#}").contains("INPROG")
        {
            return Err(error.context("SENTINEL FAILOVER"));
        }
        let mut is_master = None;
        loop {
            if is_master.is_none() && self.is_master(target).await.unwrap_or(false) {
                is_master = Some(started.elapsed());
            }
            if let Some(since) = is_master
                && self.ask_master(sentinel).await? == *target
            {
                return Ok(Some((since, started.elapsed())));
            }
            if Instant::now() >= deadline {
                bail!(
                    "after {FAILOVER:?} {}:{} is {}",
                    target.host,
                    target.port,
                    if is_master.is_some() { "master, but Sentinel does not say so" } else { "not master" }
                );
            }
            sleep(LOOK).await;
        }
    }

    async fn is_master(&self, target: &Upstream) -> anyhow::Result<bool> {
        let client = open(target, &self.password).await?;
        let role = command(&client, "ROLE", &[]).await;
        close(client).await;
        Ok(match role? {
            Value::Array(parts) => parts.first().and_then(Value::as_str).is_some_and(|role| role == "master"),
            _ => false,
        })
    }
}

/// A session for a few commands. It never reconnects: what it says must be of now.
async fn open(address: &Upstream, password: &Secret) -> anyhow::Result<Client> {
    let config = Config {
        server: ServerConfig::new_centralized(&address.host, address.port),
        password: (!password.is_empty()).then(|| password.expose().to_owned()),
        fail_fast: true,
        ..Config::default()
    };
    let performance = PerformanceConfig { default_command_timeout: LIMIT, ..PerformanceConfig::default() };
    let connection = ConnectionConfig {
        connection_timeout: LIMIT,
        internal_command_timeout: LIMIT,
        max_command_attempts: 1,
        ..ConnectionConfig::default()
    };
    let client = Client::new(config, Some(performance), Some(connection), None);
    timeout(LIMIT, client.init())
        .await
        .map_err(|_| anyhow!("no session within {LIMIT:?}"))?
        .context("connect")?;
    Ok(client)
}

async fn close(client: Client) {
    // Nothing is lost when it cannot say goodbye.
    drop(timeout(LIMIT, client.quit()).await);
}

async fn command(client: &Client, name: &'static str, arguments: &[&str]) -> anyhow::Result<Value> {
    let command = CustomCommand::new_static(name, ClusterHash::FirstKey, false);
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    timeout(LIMIT, client.custom(command, arguments))
        .await
        .map_err(|_| anyhow!("no answer within {LIMIT:?}"))?
        .with_context(|| format!("{name} was refused"))
}

/// Before the first look.
#[must_use]
pub fn unseen(configured: bool) -> RedisReport {
    RedisReport { configured, ..RedisReport::default() }
}

/// Looks where the master is, once a second.
pub async fn watch(
    redis: Redis,
    seen: channel::Sender<RedisReport>,
    known: IntGauge,
    shutdown: CancellationToken,
) {
    loop {
        let report = match redis.master().await {
            Ok(master) => RedisReport {
                configured: true,
                region: redis.region(&master),
                master: Some(address(&master)),
                error: None,
            },
            Err(error) => {
                RedisReport { configured: true, error: Some(format!("{error:#}")), ..RedisReport::default() }
            }
        };
        known.set(i64::from(report.master.is_some()));
        seen.send_replace(report);
        if timeout(WATCH, shutdown.cancelled()).await.is_ok() {
            return;
        }
    }
}
