//! Finding the rows the database refuses, and storing the rest, in one transaction.
//!
//! Ranges of rows are tried under a savepoint. A range the database refuses is split at the row the error names, or else
//! in half, until the refused rows stand alone. What follows a named row is sent again, so after one only [`FIRST_STEP`] rows are
//! tried at once, and twice as many after each success: a batch costs at most about three times what a good one does, and
//! some twenty rows for each refused one. Halving costs a few times the batch for each row, by its logarithm.

use std::future::Future;
use std::time::Duration;

use deadpool_postgres::Client;

use crate::batch::committed::in_time;
use crate::dead_letter::Reason;
use crate::failure::WriteError;

/// Rows that are tried at once after one was refused.
const FIRST_STEP: usize = 16;

const NO_PARTITION: &str =
    "no partition takes the row, although the one for its time is there: was it partitioned once more?";

/// Whose fault it is that a partition is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blame {
    /// It is made.
    Nobody,
    /// All partitions for the batch's times are there.
    Row,
}

/// Rows still to be stored; `part` says which rows and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range<P> {
    pub(crate) part: P,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// A row that is not stored, and why.
#[derive(Debug)]
pub(crate) struct RefusedRow<P> {
    pub(crate) part: P,
    pub(crate) row: usize,
    pub(crate) reason: Reason,
    pub(crate) error: String,
}

/// What became of a range.
#[derive(Debug)]
pub(crate) struct Stored<P> {
    /// New rows.
    pub(crate) rows: usize,
    /// Joined into rows that were stored already.
    pub(crate) joined: usize,
    pub(crate) refused: Vec<RefusedRow<P>>,
}

impl<P> Stored<P> {
    pub(crate) fn rows(rows: u64) -> Self {
        Self { rows: usize::try_from(rows).unwrap_or(usize::MAX), ..Self::default() }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.joined += other.joined;
        self.refused.extend(other.refused);
    }
}

impl<P> Default for Stored<P> {
    fn default() -> Self {
        Self { rows: 0, joined: 0, refused: Vec::new() }
    }
}

/// Rows that can be stored piece by piece.
pub(crate) trait Rows: Sync {
    type Part: Copy + Send + Sync;

    /// Stores a range in the connection's transaction.
    fn store(
        &self,
        client: &Client,
        range: Range<Self::Part>,
    ) -> impl Future<Output = Result<Stored<Self::Part>, WriteError>> + Send;

    /// How to store rows of which some are stored already. `None` when that makes no difference.
    fn merging(part: Self::Part) -> Option<Self::Part>;
}

/// Stores everything that can be stored, `patience` for each step: a deadline over all of them would begin again for ever when
/// many rows are refused. `refused` are rows already known to be refused, not in `open`.
///
/// An error that nobody has classified counts as the row's here: the caller has found that the table takes other rows.
///
/// # Errors
/// Errors that are not the data's fault.
pub(crate) async fn isolate<R: Rows>(
    rows: &R,
    client: &Client,
    patience: Duration,
    blame: Blame,
    mut open: Vec<Range<R::Part>>,
    refused: Vec<RefusedRow<R::Part>>,
) -> Result<Stored<R::Part>, WriteError> {
    // A constraint that is checked at COMMIT would refuse the transaction as a whole, and name no row.
    let immediate = async { Ok(client.batch_execute("SET CONSTRAINTS ALL IMMEDIATE").await?) };
    in_time(patience, immediate).await?;
    let mut step = if refused.is_empty() { usize::MAX } else { FIRST_STEP };
    let mut all = Stored { refused, ..Stored::default() };
    while let Some(mut range) = open.pop() {
        if range.from == range.to {
            continue;
        }
        let end = range.to.min(range.from.saturating_add(step));
        if end < range.to {
            open.push(Range { from: end, ..range });
            range.to = end;
        }
        let stored = async {
            client.batch_execute("SAVEPOINT part").await?;
            let stored = rows.store(client, range).await?;
            client.batch_execute("RELEASE part").await?;
            Ok(stored)
        };
        let error = match in_time(patience, stored).await {
            Ok(stored) => {
                all.add(stored);
                step = step.saturating_mul(2);
                continue;
            }
            Err(error) => error,
        };
        match (error, R::merging(range.part)) {
            (WriteError::Duplicate | WriteError::Swallowed { .. }, Some(part)) => {
                in_time(patience, undo(client)).await?;
                open.push(Range { part, ..range });
            }
            (error, _) if is_of_a_row(&error, blame) => {
                in_time(patience, undo(client)).await?;
                let (message, line) = match error {
                    WriteError::Data { message, line } => (message, line),
                    WriteError::MissingPartition => (NO_PARTITION.into(), None),
                    other => (other.to_string(), None),
                };
                let named = line.map(|line| range.from + line).filter(|row| *row < range.to);
                let alone = (range.to - range.from == 1).then_some(range.from);
                match named.or(alone) {
                    Some(row) => {
                        step = FIRST_STEP;
                        let reason = Reason::RejectedByDatabase;
                        all.refused.push(RefusedRow { part: range.part, row, reason, error: message });
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
    Ok(all)
}

fn is_of_a_row(error: &WriteError, blame: Blame) -> bool {
    match error {
        WriteError::Data { .. } | WriteError::Unknown(_) => true,
        WriteError::MissingPartition => blame == Blame::Row,
        _ => false,
    }
}

/// Back to before the range that failed.
async fn undo(client: &Client) -> Result<(), WriteError> {
    Ok(client.batch_execute("ROLLBACK TO part; RELEASE part").await?)
}
