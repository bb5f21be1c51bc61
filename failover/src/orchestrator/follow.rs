//! Follows one agent's status.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::orchestrator::remote::Remote;
use crate::orchestrator::watch::RETRY;

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
