//! Counts the wish to end: Ctrl-C, SIGTERM, a terminal that closes, the key `q`. The first drains, the second aborts.

use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Cheap to clone; all clones count together.
#[derive(Debug, Clone)]
pub(super) struct Interrupts {
    count: watch::Sender<u32>,
    seen: watch::Receiver<u32>,
    _listener: Arc<JoinSet<()>>,
}

impl Interrupts {
    /// # Errors
    /// When the signals cannot be caught.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let (count, seen) = watch::channel(0);
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut hang_up = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
        let mut listener = JoinSet::new();
        let counter = count.clone();
        listener.spawn(async move {
            loop {
                tokio::select! {
                    Some(()) = interrupt.recv() => {}
                    Some(()) = terminate.recv() => {}
                    Some(()) = hang_up.recv() => {}
                    else => return,
                }
                counter.send_modify(|count| *count += 1);
            }
        });
        Ok(Self { count, seen, _listener: Arc::new(listener) })
    }

    pub(super) fn count_one(&self) {
        self.count.send_modify(|count| *count += 1);
    }

    pub(super) fn count(&self) -> u32 {
        *self.seen.borrow()
    }

    pub(super) async fn at_least(&mut self, wanted: u32) {
        // We hold a sender ourselves, so the channel never closes.
        if self.seen.wait_for(|count| *count >= wanted).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
