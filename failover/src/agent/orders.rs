//! How each order is carried out.
//!
//! An order that changes the role makes its change in one short turn and then watches for the effect; a newer one
//! does not wait for it but overtakes it, and the older one ends as `superseded`. So a clone or a start that takes long
//! never keeps a failover waiting.

mod primary;

use std::collections::BTreeSet;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use crate::agent::conf::GUARD;
use crate::agent::local::{Local, Ready};
use crate::agent::node::{Postgres, Refusal};
use crate::agent::procs;
use crate::protocol::{Command, Node, NodeStatus, Order, Postmaster, Rejoin, Sample, Stop, Upstream};

const QUERY: Duration = Duration::from_secs(2);
/// How often the effect of a reload or a promotion is looked for.
const LOOK: Duration = Duration::from_millis(2);
/// A standby that can stream does so within this time after its start.
const STREAM: Duration = Duration::from_secs(15);
/// A standby that still asks for WAL its upstream has removed, after so long, will not get it.
const WAL_GONE: Duration = Duration::from_secs(3);
/// Before a rebuild; a standby's shutdown writes a restartpoint.
const STOP: Duration = Duration::from_secs(60);
/// After this an immediate stop becomes a kill.
const IMMEDIATE: Duration = Duration::from_secs(2);

/// Carries orders out.
#[derive(Debug)]
pub struct Orders {
    node: Postgres,
    local: Local,
    ready: Arc<Ready>,
    /// Number of the newest order that changes the role.
    newest: AtomicU64,
    turn: Mutex<()>,
}

impl Orders {
    #[must_use]
    pub fn new(node: Postgres, local: Local, ready: Arc<Ready>) -> Self {
        Self { node, local, ready, newest: AtomicU64::new(0), turn: Mutex::default() }
    }

    #[must_use]
    pub fn node(&self) -> &Postgres {
        &self.node
    }

    /// Carries one order out and answers with the status after it.
    ///
    /// # Errors
    /// [`Refusal`] with a code the orchestrator can act on.
    pub async fn carry_out(&self, command: Command) -> Result<NodeStatus, Refusal> {
        self.node.accept(command.epoch)?;
        let deadline = Instant::now() + Duration::from_millis(command.limit_ms.min(24 * 3_600_000));
        let name = command.what.name();
        let started = Instant::now();
        let result = match command.what {
            Order::Checkpoint => self.checkpoint(deadline).await,
            Order::ConfirmSync { standby } => self.confirm_sync(&standby, deadline).await,
            Order::Mark { epoch } => self.mark(epoch, deadline).await,
            Order::Lead { wait_for, slots } => self.lead(self.next(), &wait_for, &slots, deadline).await,
            Order::Stand { upstream, how, guard } => {
                self.stand(self.next(), &upstream, how, guard, deadline).await
            }
            Order::Detach => self.detach(self.next(), deadline).await,
            Order::Halt { how } => {
                self.next();
                self.halt(how, deadline).await
            }
            Order::WaitFor { nodes } => self.wait_for(self.next(), &nodes, deadline).await,
        };
        let took = started.elapsed();
        match &result {
            Ok(_) => tracing::info!(order = name, epoch = command.epoch, ?took, "order carried out"),
            Err(refusal) => {
                tracing::warn!(order = name, epoch = command.epoch, ?took, code = refusal.code, %refusal, "order not carried out")
            }
        }
        result
    }

    fn next(&self) -> u64 {
        self.newest.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// An order with this number may go on.
    fn check(&self, number: u64, deadline: Instant) -> Result<(), Refusal> {
        if self.newest.load(Ordering::SeqCst) != number {
            return Err(Refusal::new("superseded", "a newer order came"));
        }
        if Instant::now() >= deadline {
            return Err(Refusal::new(
                "timeout",
                format!("not within the time; the node is {:?}", self.status().postmaster),
            ));
        }
        Ok(())
    }

    fn status(&self) -> NodeStatus {
        self.node.shared.status()
    }

    /// Waits out a stop or refuses while a tool rewrites the data.
    async fn quiet(&self, number: u64, deadline: Instant) -> Result<NodeStatus, Refusal> {
        loop {
            self.check(number, deadline)?;
            let status = self.status();
            match status.postmaster {
                Postmaster::Rebuilding { how } => {
                    return Err(Refusal::new("busy", format!("a {how:?} rewrites the data")));
                }
                Postmaster::Stopping | Postmaster::Stopped { settled: false, .. } => {
                    self.node.shared.newer_than(status.seq, Duration::from_millis(100)).await;
                }
                _ => return Ok(status),
            }
        }
    }

    async fn stand(
        &self,
        number: u64,
        upstream: &Upstream,
        how: Rejoin,
        guard: bool,
        deadline: Instant,
    ) -> Result<NodeStatus, Refusal> {
        let names: BTreeSet<Node> = if guard { [GUARD.to_owned()].into() } else { BTreeSet::new() };
        let mut status = self.quiet(number, deadline).await?;
        if how != Rejoin::Follow {
            self.is_primary(upstream).await?;
            if how == Rejoin::Rewind
                && (self.node.half_built().is_some() || status.is_stopped() && status.control.is_none())
            {
                return Err(Refusal::new("half_built", "the data cannot be rewound; only a clone helps"));
            }
            if !status.is_stopped() {
                self.halt(Stop::Fast, deadline.min(Instant::now() + STOP)).await?;
            }
            self.check(number, deadline)?;
            self.node.rebuild(how, upstream, deadline.saturating_duration_since(Instant::now())).await?;
        }
        {
            let _turn = self.turn.lock().await;
            if how == Rejoin::Follow {
                self.check(number, deadline)?;
                status = self.status();
                if status.is_writable() {
                    return Err(Refusal::new("leads", "it is writable; halt it first"));
                }
                if status.is_stopped() && (self.node.half_built().is_some() || status.control.is_none()) {
                    return Err(Refusal::new("no_data", "there is no usable data; only a clone helps"));
                }
            }
            self.node.configure(Some(upstream), Some(&names))?;
            if how != Rejoin::Follow || status.is_stopped() {
                self.node.conf().mark_standby(true)?;
                self.node.rebuilt()?;
                // A clone may be the first this node has ever had: without its system id it could not be promoted.
                self.node.control().await?;
                self.node.start().await?;
            }
        }
        let streams = |status: &NodeStatus| {
            let receiver = status.sample.as_ref().and_then(|sample| sample.receiver.as_ref());
            receiver.is_some_and(|r| r.streaming && r.host == upstream.host && r.port == upstream.port)
        };
        let began = Instant::now();
        let patience = deadline.min(began + STREAM);
        loop {
            let status = self.status();
            if streams(&status) {
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
            if status.is_stopped() {
                return Err(Refusal::new(
                    "ended",
                    format!("Postgres ended: {:?}{}", status.postmaster, self.log()),
                ));
            }
            // Crash recovery takes its time; only a standby that answers can be blamed for not streaming.
            let limit = if status.postmaster == Postmaster::Starting { deadline } else { patience };
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

    async fn detach(&self, number: u64, deadline: Instant) -> Result<NodeStatus, Refusal> {
        let status = self.quiet(number, deadline).await?;
        {
            let _turn = self.turn.lock().await;
            self.check(number, deadline)?;
            if status.is_writable() {
                return Err(Refusal::new("leads", "it is writable, not a standby"));
            }
            self.node.configure(None, None)?;
        }
        if status.is_stopped() {
            return Ok(self.status());
        }
        loop {
            self.check(number, deadline)?;
            match self.look().await {
                Ok(sample) if sample.receiver.is_none() => return Ok(self.status()),
                Ok(_) => {}
                Err(error) => tracing::debug!(error = format!("{error:#}"), "not detached yet"),
            }
            sleep(LOOK).await;
        }
    }

    /// A fresh sample, also for everybody else.
    async fn look(&self) -> anyhow::Result<Sample> {
        let session = self.ready.take().await?;
        let sample = session.1.sample(QUERY).await?;
        self.node.shared.sample(session.0, sample.clone());
        self.ready.put(session);
        Ok(sample)
    }

    /// Fast: until `deadline`. Immediate: for 2 s, then everything is killed.
    ///
    /// # Errors
    /// When it has not ended.
    pub async fn halt(&self, how: Stop, deadline: Instant) -> Result<NodeStatus, Refusal> {
        self.node.halt(how);
        let settled = |status: &NodeStatus| {
            matches!(
                status.postmaster,
                Postmaster::Stopped { settled: true, .. } | Postmaster::Rebuilding { .. }
            )
        };
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        let patience = if how == Stop::Immediate { IMMEDIATE } else { left(deadline) };
        if let Ok(status) = self.node.shared.until(patience, settled).await {
            return Ok(status);
        }
        if how == Stop::Immediate {
            tracing::warn!("an immediate stop took too long: killing");
            procs::sweep(&self.node.settings().data).await?;
        }
        self.node
            .shared
            .until(left(deadline), settled)
            .await
            .map_err(|status| Refusal::new("timeout", format!("still {:?}", status.postmaster)))
    }

    /// The last lines of Postgres' log, which may be large.
    fn log(&self) -> String {
        let read = || {
            let mut file = std::fs::File::open(&self.node.settings().postgres_log)?;
            let end = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(end.saturating_sub(4096)))?;
            let mut bytes = Vec::new();
            file.take(4096).read_to_end(&mut bytes)?;
            std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.get(lines.len().saturating_sub(6)..).unwrap_or_default();
        format!("; end of its log: {}", last.join(" | "))
    }
}
