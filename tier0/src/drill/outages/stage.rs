//! The servers and programs of one scenario, with a link where it cuts.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::{OutageArgs, Scenario};
use playground::cluster::{Cluster, Options};
use playground::link::Link;
use playground::mosquitto::Mosquitto;
use playground::program::{Launch, Program};
use playground::scratch::Scratch;

pub(super) const READY: Duration = Duration::from_secs(120);

/// Clients before servers, files last: dropping goes in this order.
pub(super) struct Stage {
    pub(super) simulator: Program,
    pub(super) consumer: Program,
    link: Option<Link>,
    pub(super) broker: Mosquitto,
    pub(super) cluster: Cluster,
    pub(super) scratch: Scratch,
}

impl Stage {
    pub(super) async fn start(scenario: Scenario, args: &OutageArgs) -> anyhow::Result<Self> {
        let scratch = Scratch::new()?;
        // As shipped: tests' little memory would not be what people run.
        let options = Options { settings: Vec::new(), ..Options::default() };
        let (cluster, broker) =
            tokio::try_join!(Cluster::start(&scratch, options), Mosquitto::start(&scratch, &[]))?;
        let link = match scenario {
            Scenario::CutConsumerBroker | Scenario::CutSimulatorBroker => {
                Some(Link::open(broker.port()).await?)
            }
            Scenario::CutConsumerPrimary | Scenario::CutPrimaryStandby => {
                Some(Link::open(cluster.primary().port()).await?)
            }
            _ => None,
        };
        let linked = |by: Scenario| link.as_ref().filter(|_| scenario == by).map(Link::port);
        if let Some(port) = linked(Scenario::CutPrimaryStandby) {
            follow_through(&cluster, port).await?;
        }
        let mut launch = Launch::new("mqtt-consumer").envs(cluster.environment()).envs(broker.environment());
        if let Some(port) = linked(Scenario::CutConsumerBroker) {
            launch = launch.set("mqtt.port", port);
        }
        if let Some(port) = linked(Scenario::CutConsumerPrimary) {
            let hosts = format!("127.0.0.1:{port},127.0.0.1:{}", cluster.standby().port());
            launch = launch.set("database.hosts", hosts);
        }
        for setting in &args.set {
            launch = launch.args(["--set".to_owned(), setting.clone()]);
        }
        let mut consumer = launch.start(scratch.path()).await?;
        consumer.ready(READY).await?;
        let mut launch = Launch::new("device-simulator").envs(broker.environment());
        if let Some(port) = linked(Scenario::CutSimulatorBroker) {
            launch = launch.set("mqtt.port", port);
        }
        let ledger = scratch.path().join("ledger.json").display().to_string();
        let simulator = launch
            .args(["--rate".to_owned(), args.rate.to_string(), "--ledger".to_owned(), ledger])
            .start(scratch.path())
            .await?;
        Ok(Self { simulator, consumer, link, broker, cluster, scratch })
    }

    /// What this scenario cuts.
    pub(super) fn link(&self) -> anyhow::Result<&Link> {
        self.link.as_ref().context("a scenario that cuts has a link")
    }
}

/// Makes the running standby stream through another port.
async fn follow_through(cluster: &Cluster, port: u16) -> anyhow::Result<()> {
    let db = cluster.standby().admin().await?;
    let known: String =
        db.query_one("SHOW primary_conninfo", &[]).await.context("ask how it streams")?.get(0);
    let direct = format!("port={}", cluster.primary().port());
    if !known.contains(&direct) {
        bail!("primary_conninfo does not hold {direct}");
    }
    let through = known.replace(&direct, &format!("port={port}")).replace('\'', "''");
    db.batch_execute(&format!("ALTER SYSTEM SET primary_conninfo = '{through}'"))
        .await
        .context("send the standby through the link")?;
    // The walreceiver that runs ends and a new one connects; the old one's place at the primary is free by then.
    db.batch_execute("SELECT pg_reload_conf()").await.context("reload")?;
    let sql = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming' AND sender_port = $1";
    let deadline = Instant::now() + READY;
    while db.query_one(sql, &[&i32::from(port)]).await.context("ask the receiver")?.get::<_, i64>(0) == 0 {
        if Instant::now() > deadline {
            bail!("the standby does not stream through the link after {READY:?}");
        }
        tokio::time::sleep(playground::child::POLL).await;
    }
    cluster.wait_synchronous().await
}
