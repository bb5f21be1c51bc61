//! What is seen of each node, and the tasks that look.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::node_control::OrderError;
use crate::protocol::NodeStatus;
use crate::view::{Seen, View};

/// Between two tries to reach an agent that does not answer.
pub(super) const RETRY: Duration = Duration::from_millis(50);

/// The view everybody adds to and the engine decides by.
#[derive(Debug)]
pub struct Watched {
    view: Mutex<View>,
    clock: Mutex<Clock>,
    pub changed: Notify,
}

/// Our own time. Somebody looks at it many times a second: when nobody did for longer, it was we who did not run, and what
/// the others did meanwhile is not silence.
#[derive(Debug)]
struct Clock {
    started: Instant,
    looked: Instant,
    paused: Duration,
}

/// Between two looks at the clock of a process that runs.
const RUNS: Duration = Duration::from_millis(300);

impl Watched {
    #[must_use]
    pub fn new<'a>(nodes: impl Iterator<Item = &'a String>) -> Self {
        let nodes = nodes.map(|node| (node.clone(), Seen::default())).collect();
        let now = Instant::now();
        let clock = Clock { started: now, looked: now, paused: Duration::ZERO };
        let view = View { nodes, ..View::default() };
        Self { view: Mutex::new(view), clock: Mutex::new(clock), changed: Notify::new() }
    }

    /// Time since our start in which we ran, as the view counts.
    pub fn now(&self) -> Duration {
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let unseen = now.saturating_duration_since(clock.looked);
        if unseen > RUNS {
            tracing::warn!(?unseen, "this process did not run for a while");
            clock.paused += unseen;
        }
        clock.looked = now;
        now.saturating_duration_since(clock.started).saturating_sub(clock.paused)
    }

    /// Ends when nothing was heard of the agent of `node` for so long, or nobody listens there.
    pub async fn silent(&self, node: &str, limit: Duration) {
        let began = self.now();
        loop {
            tokio::time::sleep(RETRY).await;
            let now = self.now();
            let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(seen) = view.nodes.get(node) else { return };
            let last = seen.heard.unwrap_or_default().max(began);
            if now.saturating_sub(last) > limit {
                return;
            }
        }
    }

    #[must_use]
    pub fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what is seen of a node.
    pub fn note(&self, node: &str, change: impl FnOnce(&mut Seen)) {
        if let Some(seen) = self.view.lock().unwrap_or_else(PoisonError::into_inner).nodes.get_mut(node) {
            change(seen);
        }
        self.changed.notify_one();
    }

    /// Changes the whole view.
    pub fn revise<T>(&self, change: impl FnOnce(&mut View) -> T) -> T {
        change(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// An agent answered. Answers can overtake one another: an older one is not believed over a newer.
    pub fn heard(&self, status: NodeStatus) {
        let now = self.now();
        let node = status.node.clone();
        self.note(&node, |seen| {
            seen.heard = Some(now);
            seen.agent_refused = false;
            let older =
                seen.status.as_ref().is_some_and(|known| known.boot == status.boot && known.seq > status.seq);
            if !older {
                seen.status = Some(status);
            }
        });
    }

    /// An agent did not answer.
    pub fn unheard(&self, error: &OrderError) {
        if let OrderError::Gone(node) = error {
            self.note(node, |seen| seen.agent_refused = true);
        }
    }
}

/// Looks at our own clock until the token is cancelled, so that a look too late means that we did not run.
pub async fn clock(watched: Arc<Watched>, shutdown: CancellationToken) {
    while tokio::time::timeout(RETRY, shutdown.cancelled()).await.is_err() {
        watched.now();
    }
}
