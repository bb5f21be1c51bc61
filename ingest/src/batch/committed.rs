//! What a commit did, and how long it may take.

use std::future::Future;
use std::time::Duration;

use tokio::time::timeout;

use crate::failure::WriteError;

/// What a commit did. `copied` until the server had all rows, `committed` from there to the answer to COMMIT.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Committed {
    pub rows: usize,
    /// Stored already, or outdone by something newer.
    pub duplicates: usize,
    /// Joined into a row that was stored already.
    pub joined: usize,
    pub copied: Duration,
    pub committed: Duration,
}

/// Without an answer in time the connection is to be dropped, not the commit cancelled: a cancelled wait for the standby
/// would be reported as a success.
pub(crate) async fn in_time<T>(
    patience: Duration,
    step: impl Future<Output = Result<T, WriteError>>,
) -> Result<T, WriteError> {
    match timeout(patience, step).await {
        Ok(outcome) => outcome,
        Err(_) => Err(WriteError::Retry(format!("no answer from Postgres within {patience:?}"))),
    }
}
