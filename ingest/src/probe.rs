//! Do the tables still take what they took before? Tells a row that is bad from a table that somebody has changed: a new NOT
//! NULL column, a trigger that refuses everything, a right that was taken away.
//!
//! Rows that were stored are offered again, in a transaction that is rolled back. What they are is the batch's business.

use std::future::Future;
use std::time::Duration;

use deadpool_postgres::Client;

use crate::batch::committed::in_time;
use crate::dead_letter;
use crate::failure::WriteError;
use crate::transaction;

/// Makes an `offer` in a transaction of its own.
///
/// # Errors
/// [`WriteError::Schema`] when it is refused; otherwise errors of the server or network.
pub(crate) async fn alone(
    client: &Client,
    patience: Duration,
    offer: impl Future<Output = Result<(), WriteError>>,
) -> Result<(), WriteError> {
    in_time(patience, async { Ok(client.batch_execute(&transaction::begin(patience)).await?) }).await?;
    let outcome = in_time(patience, in_transaction(client, offer)).await;
    if outcome.as_ref().err().is_none_or(WriteError::keeps_connection) {
        in_time(patience, transaction::roll_back(client)).await?;
    }
    outcome
}

/// Makes an `offer` in the connection's transaction and leaves that as it was.
///
/// # Errors
/// As [`alone`].
pub(crate) async fn in_transaction(
    client: &Client,
    offer: impl Future<Output = Result<(), WriteError>>,
) -> Result<(), WriteError> {
    client.batch_execute("SAVEPOINT probe; SET CONSTRAINTS ALL IMMEDIATE").await?;
    // Whoever is at fault gets a letter, so letters must be taken too.
    let outcome = match offer.await {
        Ok(()) => dead_letter::offer(client).await,
        refused => refused,
    };
    client.batch_execute("ROLLBACK TO probe; RELEASE probe").await?;
    outcome.map_err(|error| match error {
        WriteError::Data { message, .. } | WriteError::Unknown(message) => WriteError::Schema(message),
        WriteError::Duplicate => WriteError::Schema("a unique index that is not ours refuses rows".into()),
        other => other,
    })
}
