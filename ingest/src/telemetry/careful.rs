//! The careful path: rows that are stored already left out, rows the database refuses found and dead-lettered.
//!
//! One transaction. Ranges of rows are tried under a savepoint. A range the database refuses is split at the row the error
//! names, or else in half, until the refused rows stand alone; rows before a named one are known to be good, so the cost
//! is at most twice that of a good batch however many are refused. A range in which a row is stored already is merged.

use deadpool_postgres::Client;
use tokio::time::Instant;

use super::Batch;
use super::encoded::Encoded;
use crate::batch::{Committed, Path};
use crate::dead_letter::DeadLetter;
use crate::failure::WriteError;
use crate::reading;

/// Which rows of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Fresh,
    Suspects,
}

/// How a range is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Copy,
    Merge,
}

/// Rows still to be stored.
#[derive(Debug, Clone, Copy)]
struct Range {
    part: Part,
    how: How,
    from: usize,
    to: usize,
}

impl Range {
    fn split(self, at: usize) -> [Self; 2] {
        [Self { to: at, ..self }, Self { from: at, ..self }]
    }
}

/// What the ranges came to.
#[derive(Debug, Default)]
struct Sorted {
    stored: usize,
    refused: Vec<(Part, usize, String)>,
}

impl Batch {
    pub(super) async fn commit_carefully(
        &mut self,
        client: &Client,
        path: Path,
    ) -> Result<Committed, WriteError> {
        let started = Instant::now();
        client.batch_execute("BEGIN").await?;
        let sorted = self.sort_out(client, path).await?;
        let letters: Vec<(usize, DeadLetter)> = sorted
            .refused
            .into_iter()
            .filter_map(|(part, row, message)| self.letter(part, row, message))
            .collect();
        let (deliveries, letters): (Vec<usize>, Vec<DeadLetter>) = letters.into_iter().unzip();
        let done = self.finish(client, sorted.stored, &letters, started).await?;
        self.deliveries.refused_by_database(deliveries);
        Ok(done)
    }

    fn part(&self, part: Part) -> &Encoded {
        match part {
            Part::Fresh => &self.fresh,
            Part::Suspects => &self.suspects,
        }
    }

    /// Stores everything that can be stored, in the connection's transaction.
    async fn sort_out(&self, client: &Client, path: Path) -> Result<Sorted, WriteError> {
        let how = if path == Path::Isolate { How::Copy } else { How::Merge };
        let fresh = Range { part: Part::Fresh, how, from: 0, to: self.fresh.len() };
        let suspects = Range { part: Part::Suspects, how: How::Merge, from: 0, to: self.suspects.len() };
        let mut sorted = Sorted::default();
        let mut open = vec![suspects];
        // The row that made the fast path fail need not be found again.
        match self.named.as_ref().filter(|(row, _)| path == Path::Isolate && *row < fresh.to) {
            Some((row, message)) => {
                sorted.refused.push((Part::Fresh, *row, message.clone()));
                open.extend([Range { from: row + 1, ..fresh }, Range { to: *row, ..fresh }]);
            }
            None => open.push(fresh),
        }
        while let Some(range) = open.pop() {
            if range.from == range.to {
                continue;
            }
            client.batch_execute("SAVEPOINT part").await?;
            match self.store(client, range).await {
                Ok(stored) => {
                    sorted.stored += stored;
                    client.batch_execute("RELEASE part").await?;
                }
                Err(WriteError::Duplicate) if range.how == How::Copy => {
                    client.batch_execute("ROLLBACK TO part; RELEASE part").await?;
                    open.push(Range { how: How::Merge, ..range });
                }
                Err(WriteError::Data { message, line }) => {
                    client.batch_execute("ROLLBACK TO part; RELEASE part").await?;
                    let named = line.map(|line| range.from + line).filter(|row| *row < range.to);
                    match named {
                        Some(row) => {
                            sorted.refused.push((range.part, row, message));
                            open.extend([Range { from: row + 1, ..range }, Range { to: row, ..range }]);
                        }
                        None if range.to - range.from == 1 => {
                            sorted.refused.push((range.part, range.from, message));
                        }
                        None => {
                            let [first, second] = range.split(range.from.midpoint(range.to));
                            open.extend([second, first]);
                        }
                    }
                }
                Err(other) => return Err(other),
            }
        }
        Ok(sorted)
    }

    async fn store(&self, client: &Client, range: Range) -> Result<usize, WriteError> {
        let rows = self.part(range.part);
        match range.how {
            How::Merge => rows.merge(client, range.from, range.to).await,
            How::Copy => {
                let copied = rows.copy(client, "device_telemetry", range.from, range.to).await?;
                Ok(usize::try_from(copied).unwrap_or(usize::MAX))
            }
        }
    }

    /// The dead letter of a refused row, and the number of its delivery.
    fn letter(&self, part: Part, row: usize, error: String) -> Option<(usize, DeadLetter)> {
        let number = self.part(part).delivery(row)?;
        let delivery = self.deliveries.get(number)?;
        let time = self.part(part).timestamps().nth(row)?;
        let element = reading::part_at(&delivery.topic, &delivery.payload, &self.rules, time);
        Some((number, self.deliveries.letter(number, element, error)?))
    }
}
