//! Temporary tables that rows pass through on their way.
//!
//! They have the columns that are sent, of the types that the table has, and nothing else of it: what somebody adds to the
//! table is no business of theirs.

use tokio_postgres::Client;

use crate::failure::WriteError;

/// Makes what is missing, with statements of which no row is a part. So an error is never a row's fault.
///
/// # Errors
/// [`WriteError::Schema`] when the session may or can make no such table; otherwise errors of the server or network.
pub(crate) async fn make(client: &Client, sql: &str) -> Result<(), WriteError> {
    client.batch_execute(sql).await.map_err(|error| match WriteError::from(error) {
        WriteError::Data { message, .. } | WriteError::Unknown(message) => {
            WriteError::Schema(format!("temporary tables are needed and cannot be made: {message}"))
        }
        WriteError::Duplicate | WriteError::MissingPartition => {
            WriteError::Retry("a temporary table was not made".into())
        }
        other => other,
    })
}
