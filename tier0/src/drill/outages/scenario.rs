//! What is taken away, and how it comes back.

use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ValueEnum;

use super::OutageArgs;
use super::stage::{READY, Stage};
use super::watch::Watch;
use playground::child::Reach;

/// Times the consumer is killed during one outage.
const KILLS: u32 = 4;

/// One way to break things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// The primary is killed (SIGKILL) and started again
    PostgresAway,
    /// The same with its only standby: no commit may return meanwhile
    StandbyAway,
    /// The primary and its sessions are stopped (SIGSTOP): connections are accepted, nothing answers
    PrimaryFrozen,
    /// The broker ends in order and is started again
    BrokerRestart,
    /// The consumer is killed (SIGKILL) four times with rows on their way
    ConsumerKill,
    CutConsumerBroker,
    CutConsumerPrimary,
    CutPrimaryStandby,
    CutSimulatorBroker,
}

impl Scenario {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PostgresAway => "postgres-away",
            Self::StandbyAway => "standby-away",
            Self::PrimaryFrozen => "primary-frozen",
            Self::BrokerRestart => "broker-restart",
            Self::ConsumerKill => "consumer-kill",
            Self::CutConsumerBroker => "cut-consumer-broker",
            Self::CutConsumerPrimary => "cut-consumer-primary",
            Self::CutPrimaryStandby => "cut-primary-standby",
            Self::CutSimulatorBroker => "cut-simulator-broker",
        }
    }

    /// Whether the consumer must not lose its broker: only what lies on the other side is away.
    #[must_use]
    pub fn keeps_the_broker(self) -> bool {
        !matches!(self, Self::BrokerRestart | Self::ConsumerKill | Self::CutConsumerBroker)
    }

    /// Breaks it, waits for the length of the outage, mends it.
    pub(super) async fn happen(
        self,
        stage: &mut Stage,
        watch: &mut Watch,
        args: &OutageArgs,
    ) -> anyhow::Result<()> {
        match self {
            Self::PostgresAway => stage.cluster.primary_mut().kill9(Reach::Tree).await?,
            Self::StandbyAway => stage.cluster.standby_mut().kill9(Reach::Tree).await?,
            Self::PrimaryFrozen => stage.cluster.primary_mut().pause(Reach::Tree),
            Self::BrokerRestart => stage.broker.stop().await?,
            Self::ConsumerKill => {
                kill_the_consumer(stage, watch, args.outage).await?;
                watch.mended();
                return Ok(());
            }
            _ => stage.link()?.cut(),
        }
        watch.hold(stage, args.outage).await;
        match self {
            Self::PostgresAway => stage.cluster.primary_mut().start().await?,
            Self::StandbyAway => stage.cluster.standby_mut().start().await?,
            Self::PrimaryFrozen => stage.cluster.primary_mut().resume(),
            Self::BrokerRestart => stage.broker.start_again().await?,
            _ => stage.link()?.restore(args.after_cut),
        }
        watch.mended();
        Ok(())
    }
}

/// Half of each turn away, half of it up and catching up; after the last one it is left alone.
async fn kill_the_consumer(stage: &mut Stage, watch: &mut Watch, outage: Duration) -> anyhow::Result<()> {
    let half = outage / (2 * KILLS);
    for turn in 1..=KILLS {
        let deadline = Instant::now() + READY;
        while watch.look(stage).await.rows_in_flight == 0 {
            anyhow::ensure!(Instant::now() < deadline, "the consumer never has rows on their way");
        }
        stage.consumer.kill9().await.context("kill the consumer")?;
        watch.hold(stage, half).await;
        stage.consumer.restart().await?;
        stage.consumer.ready(READY).await?;
        if turn < KILLS {
            watch.hold(stage, half).await;
        }
    }
    Ok(())
}
