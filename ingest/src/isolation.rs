//! Finding the rows the database refuses, and storing the rest, in one transaction.
//!
//! Ranges of rows are tried under a savepoint. A range the database refuses is split at the row the error names, or else
//! in half, until the refused rows stand alone; rows before a named one are known to be good, so the cost is at most
//! twice that of a good batch however many are refused.

use std::future::Future;
use std::time::Duration;

use deadpool_postgres::Client;

use crate::batch::in_time;
use crate::failure::WriteError;

/// Rows still to be stored; `part` says which rows and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range<P> {
    pub(crate) part: P,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// Rows that can be stored piece by piece.
pub(crate) trait Rows: Sync {
    type Part: Copy + Send + Sync;

    /// Stores a range in the connection's transaction; returns how many rows were new.
    fn store(
        &self,
        client: &Client,
        range: Range<Self::Part>,
    ) -> impl Future<Output = Result<usize, WriteError>> + Send;

    /// How to store rows of which some are stored already. `None` when that makes no difference.
    fn merging(part: Self::Part) -> Option<Self::Part>;
}

/// What the ranges came to.
#[derive(Debug)]
pub(crate) struct Isolated<P> {
    pub(crate) stored: usize,
    /// Part, row and the database's words.
    pub(crate) refused: Vec<(P, usize, String)>,
}

/// Stores everything that can be stored, `patience` for each step: a deadline over all of them would begin again for ever when
/// many rows are refused. `refused` are rows already known to be refused, not in `open`.
///
/// # Errors
/// Errors that are not the data's fault.
pub(crate) async fn isolate<R: Rows>(
    rows: &R,
    client: &Client,
    patience: Duration,
    mut open: Vec<Range<R::Part>>,
    refused: Vec<(R::Part, usize, String)>,
) -> Result<Isolated<R::Part>, WriteError> {
    let mut isolated = Isolated { stored: 0, refused };
    while let Some(range) = open.pop() {
        if range.from == range.to {
            continue;
        }
        let stored = async {
            client.batch_execute("SAVEPOINT part").await?;
            let stored = rows.store(client, range).await?;
            client.batch_execute("RELEASE part").await?;
            Ok(stored)
        };
        let error = match in_time(patience, stored).await {
            Ok(stored) => {
                isolated.stored += stored;
                continue;
            }
            Err(error) => error,
        };
        match (error, R::merging(range.part)) {
            (WriteError::Duplicate, Some(part)) => {
                in_time(patience, undo(client)).await?;
                open.push(Range { part, ..range });
            }
            (WriteError::Data { message, line }, _) => {
                in_time(patience, undo(client)).await?;
                let named = line.map(|line| range.from + line).filter(|row| *row < range.to);
                let alone = (range.to - range.from == 1).then_some(range.from);
                match named.or(alone) {
                    Some(row) => {
                        isolated.refused.push((range.part, row, message));
                        open.extend([Range { from: row + 1, ..range }, Range { to: row, ..range }]);
                    }
                    None => {
                        let middle = range.from.midpoint(range.to);
                        open.extend([Range { from: middle, ..range }, Range { to: middle, ..range }]);
                    }
                }
            }
            (error, _) => return Err(error),
        }
    }
    Ok(isolated)
}

/// Back to before the range that failed.
async fn undo(client: &Client) -> Result<(), WriteError> {
    Ok(client.batch_execute("ROLLBACK TO part; RELEASE part").await?)
}
