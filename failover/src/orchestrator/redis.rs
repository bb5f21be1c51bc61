//! Redis follows the region, through its Sentinels: they promote, we ask.
//!
//! A failover moves Redis in a step of its own ([`Redis::follow`]); [`keep`] compares every second, and finishes what a
//! step could not. Neither believes a single Sentinel: see [`sight`].
//!
//! Two moments are reported apart: the replica is master (clients that ask it can write), and most Sentinels say so
//! (clients that ask them find it), which has a fixed cost of about a second inside Sentinel.

mod alarms;
pub mod keep;
mod session;
pub mod sight;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use failover_api::{Node, RedisReport};
use fred::types::Value;
use futures_util::future::{join, join_all};
use service::secret::Secret;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use crate::orchestrator::report::address;
use crate::orchestrator::settings::RedisSettings;
use crate::protocol::Upstream;
use sight::{Role, Sight, is_majority};

/// Sentinel's own failover, its fixed second included. If larger, a failover of the region takes longer than promised when
/// Sentinel does not do it.
const FAILOVER: Duration = Duration::from_secs(4);
/// How long Sentinels may be behind a target that is master already, before one of them is given the order all the same.
const BEHIND: Duration = Duration::from_secs(2);
/// Between two looks at the target.
const LOOK: Duration = Duration::from_millis(10);
/// Between two questions to all Sentinels.
const ASK: Duration = Duration::from_millis(50);

/// The Sentinels and what they watch.
#[derive(Debug, Clone)]
pub struct Redis {
    sentinels: Vec<Upstream>,
    instances: BTreeMap<Node, Upstream>,
    master: String,
    password: Secret,
    sentinel_password: Secret,
    /// Held by whoever moves the master: one move at a time.
    moving: Arc<Mutex<()>>,
}

/// How a Redis failover went.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    pub to: Node,
    /// None when it was there already.
    pub is_master: Option<Duration>,
    pub sentinels_agree: Option<Duration>,
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
            moving: Arc::default(),
        }))
    }

    /// Asks all Sentinels and instances at once: as long as the slowest takes, at most 1.5 s.
    pub async fn look(&self) -> Sight {
        let named = self.sentinels.iter().map(|sentinel| async move {
            let named = self.named_by(sentinel).await.map_err(|error| format!("{error:#}"));
            (sentinel.clone(), named)
        });
        let roles = self.instances.iter().map(|(node, address)| async move {
            let role = self.role(address).await.map_err(|error| format!("{error:#}"));
            (node.clone(), (address.clone(), role))
        });
        let (sentinels, instances) = join(join_all(named), join_all(roles)).await;
        Sight { sentinels, instances: instances.into_iter().collect() }
    }

    /// Makes the Redis of `region` the master. Does nothing when it is, by its own word and by most Sentinels'.
    ///
    /// # Errors
    /// When it is not within 4 s; the message says how far it came.
    pub async fn follow(&self, region: &str) -> anyhow::Result<Moved> {
        let target =
            self.instances.get(region).with_context(|| format!("redis.instances has none in {region}"))?;
        let started = Instant::now();
        let deadline = started + FAILOVER;
        let _moving =
            timeout_at(deadline, self.moving.lock()).await.context("another move of Redis is under way")?;
        let place = address(target);
        match self.role(target).await.with_context(|| format!("{place} does not answer"))? {
            Role::Master => {
                if is_majority(self.naming_by(target, started + BEHIND).await, self.sentinels.len()) {
                    return Ok(Moved { to: region.to_owned(), is_master: None, sentinels_agree: None });
                }
            }
            // Its old data is gone, and what it has of the new is a part.
            Role::Replica { copying: true } => bail!("{place} is a replica that has not all data yet"),
            Role::Replica { copying: false } => {}
            Role::Other(other) => bail!("{place} is no Redis, but a {other}"),
        }
        self.ask_for(target).await?;
        while !matches!(self.role(target).await, Ok(Role::Master)) {
            if Instant::now() >= deadline {
                bail!("after {FAILOVER:?} {place} is not master");
            }
            sleep(LOOK).await;
        }
        let is_master = Some(started.elapsed());
        let (naming, sentinels) = (self.naming_by(target, deadline).await, self.sentinels.len());
        if !is_majority(naming, sentinels) {
            bail!("after {FAILOVER:?} {place} is master, but {naming} of {sentinels} Sentinels name it");
        }
        Ok(Moved { to: region.to_owned(), is_master, sentinels_agree: Some(started.elapsed()) })
    }

    /// Gives the order to the first Sentinel that takes it, as the answers come in.
    ///
    /// Only one that watches another of our instances is given it: one that names the target has nothing to do, and one
    /// that names an address of nobody would move what is not ours.
    async fn ask_for(&self, target: &Upstream) -> anyhow::Result<()> {
        let mut asking = self.ask_all();
        let mut failure = anyhow!("no Sentinel answers");
        while let Some(answer) = asking.join_next().await {
            let (sentinel, named) = answer.context("the question to a Sentinel failed")?;
            let place = address(&sentinel);
            match named {
                Err(error) => failure = error.context(format!("Sentinel {place}")),
                Ok(named) if named == *target => {
                    failure = anyhow!("Sentinel {place} names {} already", address(target));
                }
                Ok(named) if !self.instances.values().any(|instance| *instance == named) => {
                    failure = anyhow!("Sentinel {place} names {}, which is of no region", address(&named));
                }
                Ok(_) => match self.order(&sentinel).await {
                    Ok(()) => {
                        asking.detach_all();
                        return Ok(());
                    }
                    Err(error) => failure = error.context(format!("Sentinel {place}")),
                },
            }
        }
        Err(failure)
    }

    async fn order(&self, sentinel: &Upstream) -> anyhow::Result<()> {
        let order = ["failover", &self.master];
        match session::ask(sentinel, &self.sentinel_password, "SENTINEL", &order).await {
            // A failover that is under way already (the Sentinels saw the master die) is as good as ours.
            Err(error) if !format!("{error:#}").contains("INPROG") => Err(error.context("SENTINEL FAILOVER")),
            _ => Ok(()),
        }
    }

    /// How many Sentinels name the address: as soon as most do, or at the deadline.
    async fn naming_by(&self, target: &Upstream, deadline: Instant) -> usize {
        loop {
            let naming = self.naming(target).await;
            if is_majority(naming, self.sentinels.len()) || Instant::now() >= deadline {
                return naming;
            }
            sleep(ASK).await;
        }
    }

    /// How many Sentinels name the address; does not wait for the rest when most do.
    async fn naming(&self, target: &Upstream) -> usize {
        let mut asking = self.ask_all();
        let mut naming = 0;
        while let Some(answer) = asking.join_next().await {
            naming += usize::from(answer.is_ok_and(|(_, named)| named.is_ok_and(|named| named == *target)));
            if is_majority(naming, self.sentinels.len()) {
                break;
            }
        }
        // Each ends by itself, within 1.5 s; one that is ended leaves its session open.
        asking.detach_all();
        naming
    }

    fn ask_all(&self) -> JoinSet<(Upstream, anyhow::Result<Upstream>)> {
        let mut asking = JoinSet::new();
        for sentinel in self.sentinels.iter().cloned() {
            let redis = self.clone();
            asking.spawn(async move {
                let named = redis.named_by(&sentinel).await;
                (sentinel, named)
            });
        }
        asking
    }

    async fn named_by(&self, sentinel: &Upstream) -> anyhow::Result<Upstream> {
        let question = ["get-master-addr-by-name", &self.master];
        let answer = session::ask(sentinel, &self.sentinel_password, "SENTINEL", &question).await?;
        let pair: (String, u16) =
            answer.convert().with_context(|| format!("no master named {}", self.master))?;
        Ok(Upstream { host: pair.0, port: pair.1 })
    }

    async fn role(&self, instance: &Upstream) -> anyhow::Result<Role> {
        let answer = session::ask(instance, &self.password, "ROLE", &[]).await?;
        let Value::Array(parts) = &answer else { bail!("ROLE answered {answer:?}") };
        let part = |index: usize| parts.get(index).and_then(Value::as_str);
        let name = part(0).context("ROLE answered nothing")?;
        Ok(match &*name {
            "master" => Role::Master,
            // Of "slave", host, port, state, offset.
            "slave" => Role::Replica { copying: part(3).is_some_and(|state| &*state == "sync") },
            other => Role::Other(other.to_owned()),
        })
    }
}

/// Before the first look.
#[must_use]
pub fn unseen(configured: bool) -> RedisReport {
    RedisReport { configured, ..RedisReport::default() }
}
