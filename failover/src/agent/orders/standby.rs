//! The orders that make a standby, and those to one.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, anyhow};
use failover_api::Node;
use tokio::time::{Instant, sleep, timeout};

use super::{LOOK, Orders, QUERY};
use crate::agent::conf::GUARD;
use crate::agent::local::Local;
use crate::agent::node::Refusal;
use crate::agent::symptoms;
use crate::protocol::{Code, NodeStatus, Postmaster, Rejoin, Sample, Stop, Upstream};

/// A standby that can stream does so within this time after its start.
const STREAM: Duration = Duration::from_secs(15);
/// A standby whose log names a reason, after so long, is not helped by waiting.
const HOPELESS: Duration = Duration::from_secs(3);
/// What a copy needs beside the databases: WAL that comes meanwhile.
const ROOM: u64 = 256 << 20;
/// It writes what a checkpoint writes.
const RESTART_POINT: Duration = Duration::from_secs(120);
/// Before a rebuild; a standby's shutdown writes a restartpoint.
const STOP: Duration = Duration::from_secs(60);

/// What a standby is told, see [`crate::protocol::Order::Follow`].
pub(super) struct Standby {
    pub(super) upstream: Upstream,
    pub(super) how: Rejoin,
    pub(super) slots: BTreeSet<Node>,
    pub(super) leads: u32,
    pub(super) discarded: bool,
}

impl Orders {
    pub(super) async fn stand(
        &self,
        number: u64,
        role: &Standby,
        deadline: Instant,
    ) -> Result<NodeStatus, Refusal> {
        let (names, upstream, leads) = (guarded(), &role.upstream, role.leads);
        if role.how != Rejoin::Follow {
            self.rebuild(number, role, &names, deadline).await?;
        }
        let from = self.log_end();
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if status.is_writable() {
                return Err(Refusal::new(Code::Leads, "it is writable; halt it first"));
            }
            if status.estranged {
                let message =
                    "its data was a primary's and has not been rewound; only a rewind or a clone helps";
                return Err(Refusal::new(Code::Estranged, message));
            }
            if status.is_stopped() {
                self.ready_to_start(number, &status, deadline).await?;
                let led = status.control.as_ref().filter(|control| !control.standby);
                if led.is_some_and(|control| status.touched || leads > 0 && control.timeline >= leads) {
                    let message = "its data was led as a primary's beside the one to follow; only a rewind or a clone helps";
                    return Err(Refusal::new(Code::Estranged, message));
                }
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
            // It would try for ever.
            let log = if began.elapsed() > HOPELESS { self.log(from) } else { String::new() };
            if let Some(code) = symptoms::of_log(&log).filter(|code| *code != Code::NotStreaming) {
                return Err(Refusal::new(code, format!("it cannot stream{log}")));
            }
            if began.elapsed() > HOPELESS
                && let Some(trouble) = &status.trouble
            {
                let code = symptoms::of_log(trouble).filter(|code| *code == Code::Access);
                if let Some(code) = code {
                    let message = format!("the agent cannot ask its Postgres: {trouble}");
                    return Err(Refusal::new(code, message));
                }
            }
            self.not_ended(&status, from)?;
            // Crash recovery takes its time; only a standby that answers can be blamed for not streaming.
            let limit = if status.postmaster == Postmaster::Starting { deadline } else { patience };
            if Instant::now() >= limit && streaming.is_some() {
                let message = format!("it streams, but reads no configuration{}", self.log(from));
                return Err(Refusal::new(Code::Unread, message));
            }
            if Instant::now() >= limit {
                return Err(Refusal::new(
                    Code::NotStreaming,
                    format!("it does not stream from {}:{}{}", upstream.host, upstream.port, self.log(from)),
                ));
            }
            self.check(number, deadline)?;
            self.node.shared.newer_than(status.seq, Duration::from_millis(100)).await;
        }
        // What it has, the primary has.
        self.node.set_alone(false)?;
        self.drop_slots(&role.slots).await;
        self.restart_point();
        Ok(self.status())
    }

    /// Rewrites the data of a node, which is stopped for it and is a standby of `upstream` afterwards, not started yet.
    async fn rebuild(
        &self,
        number: u64,
        role: &Standby,
        names: &BTreeSet<Node>,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let Standby { upstream, how, .. } = role;
        let how = *how;
        self.is_ours()?;
        let (turn, status) = self.turn(number, deadline).await?;
        drop(turn);
        if (status.touched || status.alone) && !status.empty && !role.discarded {
            let message = "it may have what no other node has: POST /discard/{region} gives it up";
            return Err(Refusal::new(Code::Touched, message));
        }
        let size = self.is_primary(upstream).await?;
        // Somebody may have promoted it since the order was given.
        if status.is_writable() {
            return Err(Refusal::new(Code::Leads, "it is writable; halt it first"));
        }
        if how == Rejoin::Rewind
            && (self.node.half_built().is_some() || status.is_stopped() && status.control.is_none())
        {
            return Err(Refusal::new(Code::HalfBuilt, "the data cannot be rewound; only a clone helps"));
        }
        if how == Rejoin::Clone {
            self.has_room(size)?;
        }
        if !status.is_stopped() {
            self.halt(number, Stop::Fast, deadline.min(Instant::now() + STOP)).await?;
        }
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if !status.is_stopped() {
                return Err(Refusal::new(Code::Busy, "it runs again; halt it first"));
            }
            // From here on nobody starts it.
            self.node.begin_rebuild(how)?;
        }
        let limit = deadline.saturating_duration_since(Instant::now());
        self.node.rebuild(how, upstream, names, limit).await
    }

    /// Runs as a standby of nobody. Data that was a primary's is marked: it may have what no other node has, and must
    /// not follow one until it was rewound or cloned.
    pub(super) async fn wake(&self, number: u64, deadline: Instant) -> Result<NodeStatus, Refusal> {
        let from = self.log_end();
        {
            let (_turn, status) = self.turn(number, deadline).await?;
            if status.is_writable() {
                return Err(Refusal::new(Code::Leads, "it is writable; halt it first"));
            }
            if status.is_stopped() {
                self.ready_to_start(number, &status, deadline).await?;
                if status.control.as_ref().is_some_and(|control| !control.standby) {
                    self.node.set_estranged(true)?;
                }
                self.node.configure(None, Some(&guarded()))?;
                self.node.start_as_standby(status.control.as_ref()).await?;
            }
        }
        loop {
            let status = self.status();
            if status.is_standby() {
                return Ok(status);
            }
            self.not_ended(&status, from)?;
            self.check(number, deadline)?;
            self.node.shared.newer_than(status.seq, Duration::from_millis(100)).await;
        }
    }

    /// A rebuild must not begin before its source is known to be there. Answers with the size of what a copy would hold, if
    /// the upstream tells.
    async fn is_primary(&self, upstream: &Upstream) -> Result<Option<u64>, Refusal> {
        let session = Local::of(self.node.settings(), upstream).open().await.map_err(|error| {
            let text = format!("reach the upstream: {error:#}");
            Refusal::new(symptoms::of_tool(&text), text)
        })?;
        let row = timeout(QUERY, session.client.query_one("SELECT pg_is_in_recovery()", &[]))
            .await
            .map_err(|_| anyhow!("the upstream does not answer"))?
            .context("ask the upstream")?;
        if row.try_get::<_, bool>(0).context("read the answer")? {
            return Err(Refusal::new(Code::NoUpstream, "the upstream is a standby itself"));
        }
        let sum = "SELECT sum(pg_database_size(oid))::bigint FROM pg_database WHERE datallowconn";
        let size = match timeout(QUERY, session.client.query_one(sum, &[])).await {
            Ok(Ok(row)) => row.try_get::<_, Option<i64>>(0).ok().flatten(),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the upstream does not tell its size");
                None
            }
            Err(_) => None,
        };
        Ok(size.and_then(|size| u64::try_from(size).ok()))
    }

    /// The old data stays until the copy is whole: there must be room for both.
    fn has_room(&self, size: Option<u64>) -> Result<(), Refusal> {
        let data = &self.node.settings().data;
        let Ok(disk) = nix::sys::statvfs::statvfs(data) else { return Ok(()) };
        let free = disk.blocks_available() * disk.fragment_size();
        match size {
            Some(size) if free < size + ROOM => {
                let message = format!(
                    "a copy of {size} bytes does not fit beside the old data: {free} bytes are free at {}. Free space; the old data is \
                     kept until the copy is whole",
                    data.display()
                );
                Err(Refusal::new(Code::Space, message))
            }
            _ => Ok(()),
        }
    }

    /// Beside everything else: a standby keeps WAL from its last restart point on, and whoever is rewound from it later has to
    /// copy and replay all of that. Postgres would make the next one after `checkpoint_timeout` only.
    fn restart_point(&self) {
        let Ok(only) = self.restart_point.clone().try_lock_owned() else { return };
        let local = self.local.clone();
        self.node.in_background(async move {
            let _only = only;
            let made = async {
                let session = local.open().await?;
                session.run("CHECKPOINT", RESTART_POINT).await
            };
            match made.await {
                Ok(()) => tracing::info!("restart point made"),
                Err(error) => tracing::warn!(error = format!("{error:#}"), "no restart point"),
            }
        });
    }

    /// Its own unused slots would keep a standby's WAL for nobody. Slots of other names are other people's.
    async fn drop_slots(&self, slots: &BTreeSet<Node>) {
        let dropped = async {
            let session = self.ready.take().await?;
            let slots: Vec<&str> = slots.iter().map(String::as_str).collect();
            let sql = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
                       WHERE NOT active AND slot_type = 'physical' AND slot_name = ANY ($1)";
            timeout(QUERY, session.1.client.query(sql, &[&slots])).await.context("no answer")??;
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
                return Err(Refusal::new(Code::Leads, "it is writable, not a standby"));
            }
            self.node.config_unconfirmed();
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

/// Whom a standby's commits wait for, should it ever lead: nobody bears that name.
fn guarded() -> BTreeSet<Node> {
    [GUARD.to_owned()].into()
}
