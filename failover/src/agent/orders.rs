//! How each order is carried out.
//!
//! An order that changes the role gets a number, makes its change in one short turn and then watches for the effect; a
//! newer one does not wait for the effect but overtakes it, and the older one ends as `superseded`. So a clone or a
//! start that takes long never keeps a failover waiting. Whatever starts or signals Postgres does so in a turn, and
//! looks again at its number first: an order to stop is never answered while an older one is about to start it.

mod primary;
mod standby;
#[cfg(test)]
mod tests;

use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{Instant, timeout_at};

use crate::agent::local::{Local, Ready};
use crate::agent::node::{Postgres, Refusal};
use crate::agent::procs;
use crate::agent::symptoms;
use crate::protocol::{Code, Command, NodeStatus, Order, Postmaster, Sample, Stop};
use standby::Standby;

const QUERY: Duration = Duration::from_secs(2);
/// How often the effect of a reload or a promotion is looked for.
const LOOK: Duration = Duration::from_millis(2);
/// After this an immediate stop becomes a kill.
const IMMEDIATE: Duration = Duration::from_secs(2);
/// In place of a number: the agent ends, no further order is accepted.
const ENDING: u64 = u64::MAX;

/// Carries orders out.
#[derive(Debug)]
pub struct Orders {
    node: Postgres,
    local: Local,
    ready: Arc<Ready>,
    /// Number of the newest order that changes the role, or [`ENDING`].
    newest: AtomicU64,
    turn: Mutex<()>,
    /// One restart point at a time: a standby that comes and goes must not gather sessions that wait for its disk.
    restart_point: Arc<Mutex<()>>,
}

impl Orders {
    #[must_use]
    pub fn new(node: Postgres, local: Local, ready: Arc<Ready>) -> Self {
        Self {
            node,
            local,
            ready,
            newest: AtomicU64::new(0),
            turn: Mutex::default(),
            restart_point: Arc::default(),
        }
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
        let changes_role = command.what.changes_role();
        // In one step with the epoch: the order of the higher epoch has the higher number, whichever came first.
        let number = self.node.accept(&command, || {
            if changes_role { self.next() } else { Ok(self.newest.load(Ordering::SeqCst)) }
        })??;
        let deadline = Instant::now() + Duration::from_millis(command.limit_ms.min(24 * 3_600_000));
        let name = command.what.name();
        let started = Instant::now();
        let result = match command.what {
            Order::Checkpoint => self.checkpoint(deadline).await,
            Order::ConfirmSync { standby } => self.confirm_sync(&standby, deadline).await,
            Order::Mark { epoch } => self.mark(epoch, deadline).await,
            Order::Promote { wait_for, slots, above } => {
                self.lead(number, &wait_for, &slots, above, deadline).await
            }
            Order::Follow { upstream, how, slots, leads, discarded } => {
                let role = Standby { upstream, how, slots, leads, discarded };
                self.stand(number, &role, deadline).await
            }
            Order::StartDetached => self.wake(number, deadline).await,
            Order::Detach => self.detach(number, deadline).await,
            Order::Halt { how } => self.halt(number, how, deadline).await,
            Order::WaitFor { nodes } => self.wait_for(number, &nodes, deadline).await,
        };
        let took = started.elapsed();
        match &result {
            Ok(_) => tracing::info!(order = name, epoch = command.epoch, ?took, "order carried out"),
            Err(refusal) => {
                if changes_role {
                    // Whoever tries again tells Postgres again.
                    self.node.config_unconfirmed();
                }
                tracing::warn!(order = name, epoch = command.epoch, ?took, code = ?refusal.code, %refusal, "order not carried out")
            }
        }
        result
    }

    fn next(&self) -> Result<u64, Refusal> {
        self.newest
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |number| (number != ENDING).then(|| number + 1))
            .map(|before| before + 1)
            .map_err(|_| {
                Refusal::new(Code::Ending, "the agent ends and stops its Postgres; try again when it is back")
            })
    }

    /// The agent ends: a fast stop, and no order after it.
    ///
    /// # Errors
    /// When Postgres has not ended.
    pub async fn end(&self, deadline: Instant) -> Result<NodeStatus, Refusal> {
        self.newest.store(ENDING, Ordering::SeqCst);
        self.halt(ENDING, Stop::Fast, deadline).await
    }

    /// An order with this number may go on.
    fn check(&self, number: u64, deadline: Instant) -> Result<(), Refusal> {
        if self.newest.load(Ordering::SeqCst) != number {
            return Err(Refusal::new(Code::Superseded, "a newer order came"));
        }
        if Instant::now() >= deadline {
            return Err(Refusal::new(
                Code::Timeout,
                format!("not within the time; the node is {:?}", self.status().postmaster),
            ));
        }
        Ok(())
    }

    fn status(&self) -> NodeStatus {
        self.node.shared.status()
    }

    /// The right to start, signal or configure Postgres, unless a newer order came meanwhile.
    async fn lock(&self, number: u64, deadline: Instant) -> Result<MutexGuard<'_, ()>, Refusal> {
        let turn = timeout_at(deadline, self.turn.lock()).await;
        self.check(number, deadline)?;
        turn.map_err(|_| Refusal::new(Code::Timeout, "another order has its turn for too long; try again"))
    }

    /// The same, and the status it begins with: waits out a stop, and refuses while a tool rewrites the data.
    async fn turn(
        &self,
        number: u64,
        deadline: Instant,
    ) -> Result<(MutexGuard<'_, ()>, NodeStatus), Refusal> {
        loop {
            let turn = self.lock(number, deadline).await?;
            let status = self.status();
            match status.postmaster {
                Postmaster::Rebuilding { how } => {
                    return Err(Refusal::new(Code::Busy, format!("a {how:?} rewrites the data")));
                }
                Postmaster::Stopping | Postmaster::Stopped { settled: false, .. } => {
                    drop(turn);
                    self.node.shared.newer_than(status.seq, Duration::from_millis(100)).await;
                }
                _ => return Ok((turn, status)),
            }
        }
    }

    /// Clears up after an earlier postmaster, which may take seconds: whatever is started afterwards must still be wanted. The
    /// order was given for the data that was seen: it is read again, and must be the same.
    async fn ready_to_start(
        &self,
        number: u64,
        status: &NodeStatus,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        if self.node.half_built().is_some() || status.control.is_none() {
            return Err(Refusal::new(Code::NoData, "there is no usable data; only a clone helps"));
        }
        self.is_ours()?;
        procs::sweep(&self.node.settings().data).await?;
        let life = self.node.shared.life();
        let control = self.node.control().await?;
        if control != status.control {
            self.node.shared.control(life, control);
            let message =
                "somebody has had its data in use since it was looked at: look again before you decide";
            return Err(Refusal::new(Code::Changed, message));
        }
        self.check(number, deadline)
    }

    /// Nobody else's postmaster runs on the data.
    fn is_ours(&self) -> Result<(), Refusal> {
        if !self.node.note_foreign() {
            return Ok(());
        }
        let data = self.node.settings().data.display();
        let message = format!(
            "a postmaster that the agent has not started runs on {data}: stop it (pg_ctl -D {data} stop -m fast -W), the agent must be its parent"
        );
        Err(Refusal::new(Code::Foreign, message))
    }

    /// `from`: where the log ended when that began.
    fn not_ended(&self, status: &NodeStatus, from: u64) -> Result<(), Refusal> {
        if !status.is_stopped() {
            return Ok(());
        }
        let log = self.log(from);
        let code = symptoms::of_log(&log).unwrap_or(Code::Ended);
        Err(Refusal::new(code, format!("Postgres ended: {:?}{log}", status.postmaster)))
    }

    /// A fresh sample, also for everybody else.
    async fn look(&self) -> anyhow::Result<Sample> {
        let session = self.ready.take().await?;
        let sample = session.1.sample(QUERY).await?;
        self.node.shared.sample(session.0, sample.clone());
        self.ready.put(session);
        Ok(sample)
    }

    /// Fast: until `deadline`. Immediate: for 2 s, then everything is killed. Whoever was about to start it has done so
    /// before or does it no more.
    async fn halt(&self, number: u64, how: Stop, deadline: Instant) -> Result<NodeStatus, Refusal> {
        {
            let _turn = self.lock(number, deadline).await?;
            self.node.halt(how);
        }
        let patience =
            if how == Stop::Immediate { deadline.min(Instant::now() + IMMEDIATE) } else { deadline };
        if let Some(status) = self.settled(number, patience).await? {
            return Ok(status);
        }
        if how == Stop::Immediate {
            let _turn = self.lock(number, deadline).await?;
            tracing::warn!("an immediate stop took too long: killing");
            procs::sweep(&self.node.settings().data).await?;
        }
        let status = self.settled(number, deadline).await?;
        status.ok_or_else(|| Refusal::new(Code::Timeout, format!("still {:?}", self.status().postmaster)))
    }

    /// The status when Postgres and its last child are gone, or nothing when they are not in time.
    async fn settled(&self, number: u64, until: Instant) -> Result<Option<NodeStatus>, Refusal> {
        loop {
            let status = self.status();
            if matches!(
                status.postmaster,
                Postmaster::Stopped { settled: true, .. } | Postmaster::Rebuilding { .. }
            ) {
                return Ok(Some(status));
            }
            if self.newest.load(Ordering::SeqCst) != number {
                return Err(Refusal::new(Code::Superseded, "a newer order came"));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.node.shared.newer_than(status.seq, left.min(Duration::from_millis(100))).await;
        }
    }

    /// Where Postgres' log ends now.
    fn log_end(&self) -> u64 {
        std::fs::metadata(&self.node.settings().postgres_log).map_or(0, |metadata| metadata.len())
    }

    /// The last lines of Postgres' log, which may be large, but of nothing before `from`.
    fn log(&self, from: u64) -> String {
        let read = || {
            let mut file = std::fs::File::open(&self.node.settings().postgres_log)?;
            let end = file.seek(SeekFrom::End(0))?;
            // A log that was made anew is shorter.
            let from = if from > end { 0 } else { from };
            file.seek(SeekFrom::Start(end.saturating_sub(4096).max(from)))?;
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
