//! The orders that make a standby, and those to one.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::time::{Instant, sleep, timeout};

use super::{LOOK, Orders, QUERY};
use crate::agent::conf::GUARD;
use crate::agent::local::Local;
use crate::agent::node::Refusal;
use crate::protocol::{Node, NodeStatus, Postmaster, Rejoin, Sample, Stop, UNREAD, Upstream};

/// A standby that can stream does so within this time after its start.
const STREAM: Duration = Duration::from_secs(15);
/// A standby that still asks for WAL its upstream has removed, after so long, will not get it.
const WAL_GONE: Duration = Duration::from_secs(3);
/// Before a rebuild; a standby's shutdown writes a restartpoint.
const STOP: Duration = Duration::from_secs(60);

impl Orders {
    pub(super) async fn stand(
        &self,
        number: u64,
        upstream: &Upstream,
        how: Rejoin,
        guard: bool,
        deadline: Instant,
    ) -> Result<NodeStatus, Refusal> {
        let names = guarded(guard);
        if how != Rejoin::Follow {
            self.rebuild(number, upstream, how, &names, deadline).await?;
        }
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if status.is_writable() {
                return Err(Refusal::new("leads", "it is writable; halt it first"));
            }
            if status.estranged {
                let message =
                    "its data was a primary's and has not been rewound; only a rewind or a clone helps";
                return Err(Refusal::new("estranged", message));
            }
            if status.is_stopped() {
                self.ready_to_start(number, &status, deadline).await?;
            }
            self.node.configure(Some(upstream), Some(&names))?;
            if status.is_stopped() {
                self.node.start_as_standby(status.control.as_ref()).await?;
            }
        }
        let streams = |sample: &&Sample| {
            let receiver = sample.receiver.as_ref();
            receiver.is_some_and(|r| r.streaming && r.host == upstream.host && r.port == upstream.port)
        };
        let began = Instant::now();
        let patience = deadline.min(began + STREAM);
        loop {
            let status = self.status();
            let streaming = status.sample.as_ref().filter(streams);
            if streaming.is_some_and(|sample| sample.wait_for == names) {
                break;
            }
            // It would ask for it for ever. By now what the log's end says is of this start.
            let log = if began.elapsed() > WAL_GONE { self.log() } else { String::new() };
            if ["has already been removed", "has been invalidated"].iter().any(|said| log.contains(said)) {
                return Err(Refusal::new(
                    "wal_gone",
                    format!("the upstream no longer has WAL that it needs{log}"),
                ));
            }
            self.not_ended(&status)?;
            // Crash recovery takes its time; only a standby that answers can be blamed for not streaming.
            let limit = if status.postmaster == Postmaster::Starting { deadline } else { patience };
            if Instant::now() >= limit && streaming.is_some() {
                let message = format!("it streams, but reads no configuration{}", self.log());
                return Err(Refusal::new(UNREAD, message));
            }
            if Instant::now() >= limit {
                return Err(Refusal::new(
                    "not_streaming",
                    format!("it does not stream from {}:{}{}", upstream.host, upstream.port, self.log()),
                ));
            }
            self.check(number, deadline)?;
            self.node.shared.newer_than(status.seq, Duration::from_millis(100)).await;
        }
        self.drop_slots().await;
        Ok(self.status())
    }

    /// Rewrites the data of a node, which is stopped for it and is a standby of `upstream` afterwards, not started yet.
    async fn rebuild(
        &self,
        number: u64,
        upstream: &Upstream,
        how: Rejoin,
        names: &BTreeSet<Node>,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let (turn, status) = self.turn(number, deadline).await?;
        drop(turn);
        self.is_primary(upstream).await?;
        if how == Rejoin::Rewind
            && (self.node.half_built().is_some() || status.is_stopped() && status.control.is_none())
        {
            return Err(Refusal::new("half_built", "the data cannot be rewound; only a clone helps"));
        }
        if !status.is_stopped() {
            self.halt(number, Stop::Fast, deadline.min(Instant::now() + STOP)).await?;
        }
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if !status.is_stopped() {
                return Err(Refusal::new("busy", "it runs again; halt it first"));
            }
            // From here on nobody starts it.
            self.node.begin_rebuild(how)?;
        }
        let limit = deadline.saturating_duration_since(Instant::now());
        Ok(self.node.rebuild(how, upstream, names, limit).await?)
    }

    /// Runs as a standby of nobody. Data that was a primary's is marked: it may have what no other node has, and must
    /// not follow one until it was rewound or cloned.
    pub(super) async fn wake(
        &self,
        number: u64,
        guard: bool,
        deadline: Instant,
    ) -> Result<NodeStatus, Refusal> {
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if status.is_writable() {
                return Err(Refusal::new("leads", "it is writable; halt it first"));
            }
            if status.is_stopped() {
                self.ready_to_start(number, &status, deadline).await?;
                if status.control.as_ref().is_some_and(|control| !control.standby) {
                    self.node.set_estranged(true)?;
                }
                self.node.configure(None, Some(&guarded(guard)))?;
                self.node.start_as_standby(status.control.as_ref()).await?;
            }
        }
        loop {
            let status = self.status();
            if status.is_standby() {
                return Ok(status);
            }
            self.not_ended(&status)?;
            self.check(number, deadline)?;
            self.node.shared.newer_than(status.seq, Duration::from_millis(100)).await;
        }
    }

    /// A rebuild must not begin before its source is known to be there: it ends with the data gone.
    async fn is_primary(&self, upstream: &Upstream) -> Result<(), Refusal> {
        let session = Local::of(self.node.settings(), upstream).open().await.context("reach the upstream")?;
        let row = timeout(QUERY, session.client.query_one("SELECT pg_is_in_recovery()", &[]))
            .await
            .map_err(|_| anyhow!("the upstream does not answer"))?
            .context("ask the upstream")?;
        if row.try_get::<_, bool>(0).context("read the answer")? {
            return Err(Refusal::new("no_upstream", "the upstream is a standby itself"));
        }
        Ok(())
    }

    /// A standby's own unused slots would keep its WAL for nobody.
    async fn drop_slots(&self) {
        let dropped = async {
            let session = self.ready.take().await?;
            session
                .1
                .run("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active AND slot_type = 'physical'", QUERY)
                .await?;
            self.ready.put(session);
            anyhow::Ok(())
        };
        if let Err(error) = dropped.await {
            tracing::warn!(error = format!("{error:#}"), "unused slots were not dropped");
        }
    }

    pub(super) async fn detach(&self, number: u64, deadline: Instant) -> Result<NodeStatus, Refusal> {
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if status.is_writable() {
                return Err(Refusal::new("leads", "it is writable, not a standby"));
            }
            self.node.doubt();
            self.node.configure(None, None)?;
            if status.is_stopped() {
                return Ok(self.status());
            }
        }
        loop {
            self.check(number, deadline)?;
            match self.is_detached().await {
                Ok(true) => return Ok(self.status()),
                Ok(false) => {}
                Err(error) => tracing::debug!(error = format!("{error:#}"), "not detached yet"),
            }
            sleep(LOOK).await;
        }
    }

    /// That nothing is received may have another cause, which may pass: a fence rests on what Postgres has read.
    async fn is_detached(&self) -> anyhow::Result<bool> {
        let session = self.ready.take().await?;
        let alone = session.1.follows_nobody(QUERY).await?;
        self.ready.put(session);
        Ok(alone && self.look().await?.receiver.is_none())
    }
}

/// Whom a standby's commits wait for, should it ever lead.
fn guarded(guard: bool) -> BTreeSet<Node> {
    if guard { [GUARD.to_owned()].into() } else { BTreeSet::new() }
}
