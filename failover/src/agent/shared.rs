//! The node's status as the agent knows it, and who waits for it to change.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use failover_api::Lsn;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::agent::conf::GUARD;
use crate::protocol::{Control, NodeStatus, Postmaster, Sample, millis};

/// Shared by the agent's tasks.
#[derive(Debug)]
pub struct Shared {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    /// A session of ours with this Postgres has ended, for whatever reason.
    pub(crate) session_ended: Arc<Notify>,
}

#[derive(Debug)]
struct Inner {
    status: NodeStatus,
    sampled: Instant,
    /// Samples taken before this are of an earlier life of Postgres.
    life: u64,
}

impl Shared {
    #[must_use]
    pub fn new(node: &str, boot: u64, epoch: u64) -> Self {
        let status = NodeStatus { boot, epoch, ..NodeStatus::unseen(node) };
        let inner = Inner { status, sampled: Instant::now(), life: 0 };
        Self { inner: Mutex::new(inner), changed: watch::Sender::new(1), session_ended: Arc::default() }
    }

    /// The status now, with the age of its sample.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut status = inner.status.clone();
        if let Some(sample) = &mut status.sample {
            sample.age_ms = millis(inner.sampled.elapsed());
        }
        status
    }

    /// Changes the status and wakes whoever waits.
    pub fn change(&self, change: impl FnOnce(&mut NodeStatus)) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut inner.status);
        self.wake(&mut inner);
    }

    fn wake(&self, inner: &mut Inner) {
        inner.status.seq += 1;
        self.changed.send_replace(inner.status.seq);
    }

    /// Which life of Postgres a sample that begins now will belong to.
    #[must_use]
    pub fn life(&self) -> u64 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).life
    }

    /// Postgres has ended or starts anew: what it said no longer holds.
    pub fn postmaster(&self, postmaster: Postmaster, control: Option<Control>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        tracing::info!(was = ?inner.status.postmaster, is = ?postmaster, "postmaster");
        if !matches!(postmaster, Postmaster::Running | Postmaster::Stopping) {
            inner.life += 1;
            inner.status.sample = None;
            inner.status.trouble = None;
            inner.status.guarded = false;
        }
        // What was acknowledged before it ended counts for whoever is to follow it.
        if postmaster == Postmaster::Starting {
            inner.status.acknowledged = Lsn::default();
        }
        inner.status.control = control;
        inner.status.postmaster = postmaster;
        self.wake(&mut inner);
    }

    /// How the postmaster ended, known later than that it did.
    pub fn exit(&self, life: u64, status: String, success: bool) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.life == life
            && let Postmaster::Stopped { exit, clean, .. } = &mut inner.status.postmaster
        {
            (*exit, *clean) = (Some(status), success);
            self.wake(&mut inner);
        }
    }

    /// A control file read after the postmaster ended, unless something has happened since.
    pub fn control(&self, life: u64, control: Option<Control>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.life == life && inner.status.is_stopped() {
            inner.status.control = control;
            if let Postmaster::Stopped { settled, .. } = &mut inner.status.postmaster {
                *settled = true;
            }
            self.wake(&mut inner);
        }
    }

    /// A marker was acknowledged: its number, and a position that precedes its commit.
    pub fn marker(&self, life: u64, number: u64, position: Lsn) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let status = &mut inner.status;
        status.marker = status.marker.max(number);
        status.beat += 1;
        if inner.life == life {
            inner.status.acknowledged = inner.status.acknowledged.max(position);
        }
    }

    /// A commit of ours begins or ends.
    pub fn pending(&self, pending: bool) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).status.pending = pending;
    }

    /// Something else of ours was committed: the marker is locked, and the primary works.
    pub fn beat(&self) {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).status.beat += 1;
    }

    /// Why Postgres cannot be asked now.
    pub fn trouble(&self, life: u64, trouble: String) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.life == life && inner.status.trouble.as_ref() != Some(&trouble) {
            tracing::warn!(trouble, "Postgres cannot be asked");
            inner.status.trouble = Some(trouble);
            self.wake(&mut inner);
        }
    }

    /// What Postgres says; dropped when it is from an earlier life. The first sample proves that it runs. Wakes only
    /// for what matters: positions change all the time.
    pub fn sample(&self, life: u64, sample: Sample) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.life != life || inner.status.is_stopped() {
            return;
        }
        let matters = inner.status.sample.as_ref().is_none_or(|before| differs(before, &sample));
        if inner.status.postmaster == Postmaster::Starting {
            tracing::info!(recovery = sample.in_recovery, timeline = sample.timeline, "Postgres answers");
            inner.status.postmaster = Postmaster::Running;
        }
        let guards = sample.wait_for.iter().all(|name| name == GUARD) && !sample.wait_for.is_empty();
        // Of one that was never seen as a standby nobody knows what it did before.
        let was_guarded = inner.status.guarded
            || inner.status.sample.as_ref().is_some_and(|before| before.in_recovery && guards);
        let guarded = guards && !sample.in_recovery && was_guarded;
        let matters = matters || guarded != inner.status.guarded || inner.status.trouble.is_some();
        inner.status.guarded = guarded;
        inner.status.trouble = None;
        inner.status.sample = Some(sample);
        inner.sampled = Instant::now();
        if matters {
            self.wake(&mut inner);
        }
    }

    /// Waits until the status is newer than `seq`, at most `limit`.
    pub async fn newer_than(&self, seq: u64, limit: Duration) {
        let mut changed = self.changed.subscribe();
        // Running out of time is an answer too: the heartbeat.
        drop(tokio::time::timeout(limit, changed.wait_for(|now| *now > seq)).await);
    }

    /// Waits until the status fulfils a condition.
    ///
    /// # Errors
    /// With the last status when it does not within `limit`.
    pub async fn until(
        &self,
        limit: Duration,
        condition: impl Fn(&NodeStatus) -> bool,
    ) -> Result<NodeStatus, Box<NodeStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.status();
            if condition(&status) {
                return Ok(status);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Box::new(status));
            }
            self.newer_than(status.seq, left).await;
        }
    }
}

fn differs(a: &Sample, b: &Sample) -> bool {
    let streams = |sample: &Sample| {
        sample.receiver.as_ref().map(|receiver| (receiver.streaming, receiver.host.clone(), receiver.port))
    };
    let standbys = |sample: &Sample| {
        sample.standbys.iter().map(|s| (s.node.clone(), s.streaming, s.sync)).collect::<Vec<_>>()
    };
    a.in_recovery != b.in_recovery
        || a.timeline != b.timeline
        || a.wait_for != b.wait_for
        || streams(a) != streams(b)
        || standbys(a) != standbys(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_it_ended_is_added_to_the_life_that_ended() {
        let shared = Shared::new("a", 1, 0);
        let ended = || Postmaster::Stopped { exit: None, clean: false, settled: false };
        shared.postmaster(ended(), None);
        let life = shared.life();
        shared.exit(life - 1, "another".into(), true);
        assert_eq!(shared.status().postmaster, ended());
        shared.exit(life, "signal: 9".into(), false);
        let told = Postmaster::Stopped { exit: Some("signal: 9".into()), clean: false, settled: false };
        assert_eq!(shared.status().postmaster, told);
        shared.postmaster(Postmaster::Starting, None);
        shared.exit(shared.life(), "late".into(), false);
        assert_eq!(shared.status().postmaster, Postmaster::Starting);
    }
}
