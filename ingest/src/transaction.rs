//! The one way a transaction of ours ends, and the one way a COPY ends: both know whether the server did it.
//!
//! The absence of an error proves nothing. An error can follow a command's CommandComplete (a statement timeout that fires
//! in the tail of a COPY), and COMMIT of a transaction that has failed answers ROLLBACK, which no driver calls an error.
//! Nothing else in this crate sends COMMIT.

use std::pin::Pin;
use std::time::Duration;

use bytes::Buf;
use tokio_postgres::{Client, CopyInSink, Error};

use crate::failure::WriteError;

/// Begins a transaction.
pub const BEGIN: &str = "BEGIN";

/// As [`BEGIN`], for a batch: no lock is waited for longer than half of what an answer may take. So a lock that somebody
/// holds is known as one (55P03), and not as a silence that might be the batch's fault.
#[must_use]
pub fn begin(patience: Duration) -> String {
    format!("{BEGIN}; SET LOCAL lock_timeout = {}", (patience / 2).as_millis().max(1))
}

/// A transaction that has failed refuses the savepoint (25P02), and the server skips the rest of the request: COMMIT is
/// only reached in a transaction that can commit. Deferred triggers run before the settings, not in COMMIT after them: what
/// the commit waits for, and whether we are told that it did not wait, is set when no trigger can change it any more. An
/// error of such a trigger is one of a statement: nothing is committed.
const COMMIT: &str = "SAVEPOINT tier0_commit; SET CONSTRAINTS ALL IMMEDIATE; SET LOCAL synchronous_commit = on; \
    SET LOCAL client_min_messages = warning; COMMIT";

/// Commits the connection's transaction. On `Ok` it is committed, on the standby too if the server waits for one.
///
/// # Errors
/// As classified by [`WriteError`]. After [`WriteError::Retry`] and [`WriteError::Unknown`] the connection must be thrown away:
/// it may still be in the failed transaction, or the outcome is unknown.
pub async fn commit(client: &Client) -> Result<(), WriteError> {
    Ok(client.batch_execute(COMMIT).await?)
}

/// Leaves a transaction that has failed, or one whose work is not wanted.
///
/// # Errors
/// When the connection is lost.
pub async fn roll_back(client: &Client) -> Result<(), WriteError> {
    Ok(client.batch_execute("ROLLBACK").await?)
}

/// Ends a COPY and reads all of its answers, up to the server's "ready for the next query". Returns the rows the server
/// counted.
///
/// # Errors
/// The server's, also one that follows the count.
pub async fn finish_copy<T>(mut sink: Pin<&mut CopyInSink<T>>) -> Result<u64, Error>
where
    T: Buf + 'static + Send,
{
    let rows = sink.as_mut().finish().await?;
    // The driver stops at the count. Asked again it reads one answer more, and has an error for each: the server's own, or
    // "unexpected message" when the server is ready, which is what is expected.
    match sink.finish().await {
        Err(error) if error.as_db_error().is_some() || error.is_closed() => Err(error),
        Ok(_) | Err(_) => Ok(rows),
    }
}
