//! The orders that make a primary, and those to one.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, anyhow};
use failover_api::{Lsn, Node};
use tokio::time::{Instant, sleep, timeout};

use super::{LOOK, Orders, QUERY};
use crate::agent::local::Session;
use crate::agent::node::Refusal;
use crate::agent::sampler;
use crate::protocol::{Code, NodeStatus, Sample, Stop};

/// A promotion that takes longer may wait for replay that readers hold up.
const READERS: Duration = Duration::from_millis(250);
/// Of a primary that was overtaken.
const STOP: Duration = Duration::from_secs(10);

/// What a primary is told.
struct Office<'a> {
    wait_for: &'a BTreeSet<Node>,
    slots: &'a BTreeSet<Node>,
    /// Its timeline is to be higher than this.
    above: u32,
}

impl Orders {
    pub(super) async fn lead(
        &self,
        number: u64,
        wait_for: &BTreeSet<Node>,
        slots: &BTreeSet<Node>,
        above: u32,
        deadline: Instant,
    ) -> Result<NodeStatus, Refusal> {
        let office = Office { wait_for, slots, above };
        let checkpoint_first;
        let from = self.log_end();
        self.step_back(number, above, deadline).await?;
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            // Turning waiting on takes effect when the checkpointer has seen it; not to be relied on while it is busy.
            checkpoint_first = !wait_for.is_empty()
                && status.sample.as_ref().is_some_and(|sample| sample.wait_for.is_empty());
            if status.is_stopped() {
                self.ready_to_start(number, &status, deadline).await?;
            }
            if wait_for.is_empty() {
                self.node.set_alone(true)?;
            }
            self.node.configure(None, Some(wait_for))?;
            // Data of a primary on a timeline that is not above: its next life begins with a promotion.
            let overtaken = status.control.as_ref().is_some_and(|control| control.timeline <= above);
            if status.is_stopped() && overtaken {
                self.node.start_as_standby(status.control.as_ref()).await?;
            } else if status.is_stopped() {
                self.node.start_as_it_is(status.control.as_ref()).await?;
            }
        }
        let mut asked = None;
        loop {
            self.check(number, deadline)?;
            self.not_ended(&self.status(), from)?;
            match self.try_lead(number, &office, checkpoint_first, deadline, &mut asked).await {
                Ok(Some((session, sample))) => {
                    self.node.set_estranged(false)?;
                    make_slots(&session.1, slots).await?;
                    self.node.shared.sample(session.0, sample);
                    self.ready.put(session);
                    return Ok(self.status());
                }
                Ok(None) => {}
                Err(error) => tracing::debug!(error = format!("{error:#}"), "not leading yet"),
            }
            sleep(LOOK).await;
        }
    }

    /// A primary that another node has overtaken stops: writers, who go by the timeline, would not come back to it.
    async fn step_back(&self, number: u64, above: u32, deadline: Instant) -> Result<(), Refusal> {
        let status = self.status();
        if status.is_writable() && status.sample.as_ref().is_some_and(|sample| sample.timeline <= above) {
            tracing::warn!(above, "stopping, to lead again on a higher timeline");
            self.halt(number, Stop::Fast, deadline.min(Instant::now() + STOP)).await?;
        }
        Ok(())
    }

    /// One look; promotes once when it is time.
    async fn try_lead(
        &self,
        number: u64,
        office: &Office<'_>,
        checkpoint_first: bool,
        deadline: Instant,
        asked: &mut Option<Instant>,
    ) -> anyhow::Result<Option<((u64, Session), Sample)>> {
        let session = self.ready.take().await?;
        // Asked every few milliseconds on a busy machine: the whole sample only when it is time.
        if let Some(since) = *asked
            && session.1.is_in_recovery(QUERY).await?
        {
            if since.elapsed() > READERS {
                let ended = session.1.end_readers(QUERY).await?;
                tracing::warn!(
                    ended,
                    "readers held up the replay that a promotion waits for: ended their sessions"
                );
                *asked = Some(Instant::now());
            }
            self.ready.put(session);
            return Ok(None);
        }
        let sample = session.1.sample(QUERY).await?;
        if sample.wait_for != *office.wait_for {
            self.ready.put(session);
            return Ok(None);
        }
        if !sample.in_recovery {
            return Ok(Some((session, sample)));
        }
        if sample.replay_paused {
            session.1.run("SELECT pg_wal_replay_resume()", QUERY).await?;
        }
        if asked.is_none() {
            if checkpoint_first {
                session.1.run("CHECKPOINT", deadline.saturating_duration_since(Instant::now())).await?;
            }
            // Whatever was ordered meanwhile comes first.
            let _turn = self.lock(number, deadline).await.map_err(|refusal| anyhow!(refusal.message))?;
            self.node.conf().take_timelines(sample.timeline, office.above)?;
            session.1.run("SELECT pg_promote(false)", QUERY).await?;
            *asked = Some(Instant::now());
            // While it is at that, and before its first checkpoint: what they keep begins with the last one that it has in
            // common with the former primary, from which that one is rewound.
            if let Err(error) = make_slots(&session.1, office.slots).await {
                tracing::debug!(error = format!("{error:#}"), "no slots yet");
            }
        }
        self.ready.put(session);
        Ok(None)
    }

    pub(super) async fn wait_for(
        &self,
        number: u64,
        nodes: &BTreeSet<Node>,
        deadline: Instant,
    ) -> Result<NodeStatus, Refusal> {
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if !status.is_writable() {
                return Err(Refusal::new(Code::NotPrimary, "it is not writable"));
            }
            if nodes.is_empty() {
                self.node.set_alone(true)?;
            }
            self.node.configure(None, Some(nodes))?;
        }
        loop {
            self.check(number, deadline)?;
            if self.look().await.is_ok_and(|sample| sample.wait_for == *nodes) {
                return Ok(self.status());
            }
            sleep(LOOK).await;
        }
    }

    pub(super) async fn checkpoint(&self, deadline: Instant) -> Result<NodeStatus, Refusal> {
        let session = self.local.open().await?;
        session.run("CHECKPOINT", deadline.saturating_duration_since(Instant::now())).await?;
        Ok(self.status())
    }

    /// The checkpointer is the process that switches waiting on for all others; a checkpoint asked for after the
    /// reload was seen passes through it. What was acknowledged before has to be on the standby: its flushed position
    /// passes the primary's of after the checkpoint. What comes later waits.
    pub(super) async fn confirm_sync(&self, standby: &str, deadline: Instant) -> Result<NodeStatus, Refusal> {
        let session = self.local.open().await?;
        let waits = |sample: &Sample| !sample.in_recovery && sample.wait_for.contains(standby);
        let before = session.sample(QUERY).await?;
        if !waits(&before) {
            return Err(Refusal::new(Code::NotWaitedFor, format!("commits do not wait for {standby}")));
        }
        session.run("CHECKPOINT", deadline.saturating_duration_since(Instant::now())).await?;
        let mut mark: Option<Lsn> = None;
        loop {
            let sample = session.sample(QUERY).await?;
            if sample.wait_for != before.wait_for || sample.in_recovery {
                return Err(Refusal::new(Code::Superseded, "what commits wait for has changed"));
            }
            let target = *mark.get_or_insert(sample.lsn);
            let mut bearing = sample.standbys.iter().filter(|attached| attached.node == standby);
            let found = bearing.next().filter(|found| found.is_genuine() && found.sync);
            let Some(found) = found.filter(|_| bearing.next().is_none()) else {
                return Err(Refusal::new(
                    Code::NotSync,
                    format!("{standby} is not attached as synchronous, or not alone under its name"),
                ));
            };
            if found.flushed >= target {
                // Whatever was acknowledged while somebody had it wait for nobody, the standby has now.
                self.node.set_touched(false);
                self.node.set_alone(false)?;
                return Ok(self.status());
            }
            if Instant::now() >= deadline {
                return Err(Refusal::new(
                    Code::Timeout,
                    format!("{standby} has {}, not {target}", found.flushed),
                ));
            }
            sleep(LOOK).await;
        }
    }

    pub(super) async fn mark(&self, epoch: u64, deadline: Instant) -> Result<NodeStatus, Refusal> {
        let left = || deadline.saturating_duration_since(Instant::now());
        let (life, session) = self.ready.take().await?;
        sampler::prepare(&session, &self.node.settings().replication_user, left()).await?;
        let epoch = i64::try_from(epoch).unwrap_or(i64::MAX);
        let sql = format!(
            "WITH e AS (INSERT INTO tier0_failover.epoch (epoch, node) VALUES ($1, $2) ON CONFLICT DO NOTHING) {}",
            sampler::MARK
        );
        let row = timeout(left(), session.client.query_one(&sql, &[&epoch, &self.node.settings().node]))
            .await
            .map_err(|_| Refusal::new(Code::Timeout, "the commit was not acknowledged in time"))?
            .context("commit the epoch")?;
        sampler::acknowledge(&self.node.shared, life, &row);
        self.ready.put((life, session));
        Ok(self.status())
    }
}

async fn make_slots(session: &Session, slots: &BTreeSet<Node>) -> anyhow::Result<()> {
    let slots: Vec<&str> = slots.iter().map(String::as_str).collect();
    // One that held too much was given up by Postgres: it is of no use to anybody, and stands in the way.
    let lost = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
                WHERE slot_name = ANY ($1) AND slot_type = 'physical' AND NOT active AND wal_status = 'lost'";
    timeout(QUERY, session.client.query(lost, &[&slots]))
        .await
        .map_err(|_| anyhow!("lost slots were not dropped in time"))?
        .context("drop lost slots")?;
    let sql = "SELECT pg_create_physical_replication_slot(name, true) FROM unnest($1::text[]) AS name \
               WHERE name NOT IN (SELECT slot_name FROM pg_replication_slots)";
    timeout(QUERY, session.client.query(sql, &[&slots]))
        .await
        .map_err(|_| anyhow!("the slots were not made in time"))?
        .context("make the slots")?;
    Ok(())
}
