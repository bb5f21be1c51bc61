//! What is seen of each node, and the tasks that look.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::hands::OrderError;
use crate::orchestrator::remote::Remote;
use crate::protocol::NodeStatus;
use crate::view::{Seen, View};

/// Between two tries to reach an agent that does not answer.
const RETRY: Duration = Duration::from_millis(50);

/// The view everybody adds to and the engine decides by.
#[derive(Debug)]
pub struct Watched {
    view: Mutex<View>,
    started: Instant,
    pub changed: Notify,
}

impl Watched {
    #[must_use]
    pub fn new<'a>(nodes: impl Iterator<Item = &'a String>) -> Self {
        let nodes = nodes.map(|node| (node.clone(), Seen::default())).collect();
        Self { view: Mutex::new(View { nodes }), started: Instant::now(), changed: Notify::new() }
    }

    /// Time since our start, as the view counts.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.started.elapsed()
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

/// Follows one agent's status until the token is cancelled.
pub async fn agent(node: String, remote: Arc<Remote>, heartbeat: Duration, shutdown: CancellationToken) {
    let mut after = 0;
    let mut failing = false;
    loop {
        let answer = tokio::select! {
            () = shutdown.cancelled() => return,
            answer = remote.status(&node, after, heartbeat) => answer,
        };
        match answer {
            Ok(status) => {
                if std::mem::take(&mut failing) || after == 0 {
                    tracing::info!(node, postmaster = ?status.postmaster, "agent answers");
                }
                after = status.seq;
            }
            Err(error) => {
                // The first failure may be a connection that was closed meanwhile: ask again at once.
                if failing {
                    sleep(RETRY).await;
                } else {
                    tracing::warn!(node, %error, "agent does not answer");
                }
                failing = true;
                after = 0;
            }
        }
    }
}
