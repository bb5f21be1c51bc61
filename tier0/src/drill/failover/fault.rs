//! One fault: what, to whom, when, for how long.

use std::fmt;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::stage::Stage;
use playground::link::After;
use playground::program::Program;
use playground::regions::kill_postmaster;

/// Which node, as it was when the round began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whom {
    Primary,
    Standby,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    KillPostmaster(Whom),
    KillNode(Whom),
    FreezeNode(Whom),
    FreezePostmaster(Whom),
    FreezeAgent(Whom),
    CutAgent(Whom),
    KillOrchestrator,
    FreezeOrchestrator,
    KillConsumer,
    KillRedisMaster,
    KillSentinel(usize),
    SwitchOver,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    what: What,
    /// After the beginning of the round.
    pub(super) at: Duration,
    pub(super) hold: Duration,
}

impl Fault {
    pub(super) fn draw(random: &mut StdRng, at: Duration, hold: Duration) -> Self {
        let whom = if random.random_bool(0.7) { Whom::Primary } else { Whom::Standby };
        let what = match random.random_range(0..16) {
            0 | 1 => What::KillPostmaster(whom),
            2 | 3 => What::KillNode(whom),
            4 | 5 => What::FreezeNode(whom),
            6 => What::FreezePostmaster(whom),
            7 => What::FreezeAgent(whom),
            8 | 9 => What::CutAgent(whom),
            10 => What::KillOrchestrator,
            11 => What::FreezeOrchestrator,
            12 => What::KillConsumer,
            13 => What::KillRedisMaster,
            14 => What::KillSentinel(random.random_range(0..3)),
            _ => What::SwitchOver,
        };
        Self { what, at, hold }
    }

    /// What is already hit cannot be hit again; that is no error.
    pub(super) async fn strike(&self, stage: &mut Stage, primary: &str) -> anyhow::Result<()> {
        let region = |whom| region(whom, primary);
        match self.what {
            What::KillPostmaster(whom) => {
                let node = stage.cluster.nodes.iter().find(|node| node.name() == region(whom));
                if let Err(error) = kill_postmaster(node.context("a node")?) {
                    tracing::debug!(error = format!("{error:#}"), "not killed");
                }
            }
            What::KillNode(whom) => stage.regions()?.agent(region(whom))?.kill9().await?,
            What::FreezeNode(whom) => stage.regions()?.agent(region(whom))?.pause(),
            What::FreezeAgent(whom) => signal(stage.regions()?.agent(region(whom))?.pid(), Signal::SIGSTOP),
            What::FreezePostmaster(whom) => {
                let node = stage.cluster.nodes.iter().find(|node| node.name() == region(whom));
                signal(node.and_then(playground::postgres::Postgres::pid), Signal::SIGSTOP);
            }
            What::CutAgent(whom) => {
                let links = &stage.regions()?.links;
                links.get(index(region(whom))).context("a link to the agent")?.cut();
            }
            What::KillOrchestrator => stage.regions()?.orchestrator.kill9().await?,
            What::FreezeOrchestrator => stage.regions()?.orchestrator.pause(),
            What::KillConsumer => stage.consumer.kill9().await?,
            What::KillRedisMaster => {
                let redis = stage.regions()?.redis.as_mut().context("Redis")?;
                if let Err(error) = redis.kill_master().await {
                    tracing::debug!(error = format!("{error:#}"), "no master to kill");
                }
            }
            What::KillSentinel(index) => {
                let redis = stage.regions()?.redis.as_mut().context("Redis")?;
                redis.sentinels.get_mut(index).context("a Sentinel")?.kill9().await?;
            }
            // Carried out or refused, as things are by then; it is not waited for here.
            What::SwitchOver => {
                let regions = stage.regions()?;
                let ask = regions.failover(region(Whom::Standby), "");
                drop(tokio::time::timeout(self.hold, ask).await);
            }
        }
        Ok(())
    }

    pub(super) async fn let_go(&self, stage: &mut Stage, primary: &str) -> anyhow::Result<()> {
        let region = |whom| region(whom, primary);
        match self.what {
            What::KillPostmaster(_) | What::SwitchOver => Ok(()),
            What::KillNode(whom) => restart(stage.regions()?.agent(region(whom))?).await,
            What::FreezeNode(whom) | What::FreezeAgent(whom) | What::FreezePostmaster(whom) => {
                stage.regions()?.agent(region(whom))?.resume();
                Ok(())
            }
            What::CutAgent(whom) => {
                let links = &stage.regions()?.links;
                links.get(index(region(whom))).context("a link to the agent")?.restore(After::Reset);
                Ok(())
            }
            What::KillOrchestrator => restart(&mut stage.regions()?.orchestrator).await,
            What::FreezeOrchestrator => {
                stage.regions()?.orchestrator.resume();
                Ok(())
            }
            What::KillConsumer => restart(&mut stage.consumer).await,
            What::KillRedisMaster | What::KillSentinel(_) => {
                let redis = stage.regions()?.redis.as_mut().context("Redis")?;
                for server in redis.instances.iter_mut().chain(&mut redis.sentinels) {
                    server.start_again().await?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {} ms for {} ms", self.what, self.at.as_millis(), self.hold.as_millis())
    }
}

fn region(whom: Whom, primary: &str) -> &str {
    match (whom, primary) {
        (Whom::Primary, _) => primary,
        (Whom::Standby, "region1") => "region2",
        (Whom::Standby, _) => "region1",
    }
}

fn index(region: &str) -> usize {
    usize::from(region != "region1")
}

async fn restart(program: &mut Program) -> anyhow::Result<()> {
    if program.is_running() {
        return Ok(());
    }
    program.restart().await
}

fn signal(pid: Option<i32>, signal: Signal) {
    if let Some(pid) = pid
        && let Err(error) = kill(Pid::from_raw(pid), signal)
    {
        tracing::debug!(pid, %error, "not signalled");
    }
}
