//! The careful path: rows that are stored already left out, rows the database refuses found and dead-lettered, in one
//! transaction.

use std::collections::HashSet;
use std::time::Duration;

use deadpool_postgres::Client;
use tokio::time::Instant;

use super::Batch;
use super::encoded::Encoded;
use super::merge::Merged;
use crate::batch::Path;
use crate::batch::committed::{Committed, in_time};
use crate::dead_letter::Reason;
use crate::deliveries::{RefusedPart, RefusedParts};
use crate::failure::WriteError;
use crate::isolation::{Blame, Range, RefusedRow, Rows, Stored, isolate};
use crate::transaction;

/// What became of replayed readings.
#[derive(Debug)]
pub(crate) struct Replayed {
    pub(crate) rows: usize,
    /// Stored already, or joined into a stored row.
    pub(crate) duplicates: usize,
    /// Messages of which something is refused still.
    pub(crate) refused: HashSet<usize>,
}

/// Which rows of the batch, and how they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Fresh(How),
    /// Always merged.
    Suspects,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Copy,
    Merge,
}

impl Part {
    /// What became of rows of this part that were merged.
    pub(super) fn stored(self, merged: Merged) -> Stored<Self> {
        let refused = |row, reason, error: &str| RefusedRow { part: self, row, reason, error: error.into() };
        let conflicts = merged.conflicts.into_iter().map(|row| {
            refused(
                row,
                Reason::Conflict,
                "another reading of this device with this timestamp_utc is stored; see ingest.same_identity",
            )
        });
        let missing = merged.missing.into_iter().map(|row| {
            refused(
                row,
                Reason::RejectedByDatabase,
                "device_telemetry reported success and did not keep the row: a trigger, rule or policy?",
            )
        });
        Stored { rows: merged.rows, joined: merged.joined, refused: conflicts.chain(missing).collect() }
    }
}

impl Rows for Batch {
    type Part = Part;

    async fn store(&self, client: &Client, range: Range<Part>) -> Result<Stored<Part>, WriteError> {
        let rows = self.part(range.part);
        match range.part {
            Part::Suspects | Part::Fresh(How::Merge) => {
                let merged = rows
                    .merge(client, (range.from, range.to), self.rules.same_identity, self.by_look)
                    .await?;
                Ok(range.part.stored(merged))
            }
            Part::Fresh(How::Copy) => {
                let kept = rows.copy(client, "public.device_telemetry", range.from, range.to).await?;
                let sent = range.to - range.from;
                let stored = Stored::rows(kept);
                if stored.rows == sent {
                    Ok(stored)
                } else {
                    Err(WriteError::Swallowed { sent, kept: stored.rows })
                }
            }
        }
    }

    fn merging(part: Part) -> Option<Part> {
        (part == Part::Fresh(How::Copy)).then_some(Part::Fresh(How::Merge))
    }
}

impl Batch {
    pub(super) async fn commit_carefully(
        &mut self,
        client: &Client,
        path: Path,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        let started = Instant::now();
        in_time(patience, async { Ok(client.batch_execute(&transaction::begin(patience)).await?) }).await?;
        let stored = self.sort_out(client, path, patience).await?;
        self.ask_if_all_are_refused(client, &stored, patience).await?;
        self.finish(client, stored, started, patience).await
    }

    /// Stores what can be stored, in the caller's transaction. For letters that are replayed.
    pub(crate) async fn store_for_replay(
        &self,
        client: &Client,
        path: Path,
        patience: Duration,
    ) -> Result<Replayed, WriteError> {
        let stored = self.sort_out(client, path, patience).await?;
        self.ask_if_all_are_refused(client, &stored, patience).await?;
        let refused: HashSet<usize> =
            stored.refused.iter().filter_map(|row| self.part(row.part).delivery(row.row)).collect();
        let duplicates = self.good().saturating_sub(stored.rows + stored.refused.len());
        Ok(Replayed { rows: stored.rows, duplicates, refused })
    }

    /// Not one row was taken: are these rows bad, or does the table take none any more?
    async fn ask_if_all_are_refused(
        &self,
        client: &Client,
        stored: &Stored<Part>,
        patience: Duration,
    ) -> Result<(), WriteError> {
        let by_table = stored.refused.iter().filter(|row| row.reason == Reason::RejectedByDatabase).count();
        if by_table == 0 || by_table < self.good() {
            return Ok(());
        }
        in_time(patience, crate::probe::in_transaction(client, self.offer(client))).await
    }

    fn part(&self, part: Part) -> &Encoded {
        match part {
            Part::Fresh(_) => &self.fresh,
            Part::Suspects => &self.suspects,
        }
    }

    /// Stores everything that can be stored, in the connection's transaction.
    async fn sort_out(
        &self,
        client: &Client,
        path: Path,
        patience: Duration,
    ) -> Result<Stored<Part>, WriteError> {
        let how = if path.isolates() { How::Copy } else { How::Merge };
        let blame = if path == Path::IsolateUnplaced { Blame::Row } else { Blame::Nobody };
        let fresh = Range { part: Part::Fresh(how), from: 0, to: self.fresh.len() };
        let suspects = Range { part: Part::Suspects, from: 0, to: self.suspects.len() };
        // The row that made the fast path fail need not be found again.
        match self.named.as_ref().filter(|(row, _)| path.isolates() && *row < fresh.to) {
            Some((row, message)) => {
                let open = vec![suspects, Range { from: row + 1, ..fresh }, Range { to: *row, ..fresh }];
                let (row, reason, error) = (*row, Reason::RejectedByDatabase, message.clone());
                let refused = vec![RefusedRow { part: fresh.part, row, reason, error }];
                isolate(self, client, patience, blame, open, refused).await
            }
            None => isolate(self, client, patience, blame, vec![suspects, fresh], Vec::new()).await,
        }
    }

    /// The dead letters of refused rows, with the numbers of their messages.
    pub(super) fn letters_of<'r>(&mut self, refused: &'r [RefusedRow<Part>]) -> RefusedParts {
        let part_of = |refused: &'r RefusedRow<Part>| {
            let rows = self.part(refused.part);
            let (message, element) = (rows.delivery(refused.row)?, rows.element(refused.row)?);
            Some(RefusedPart { message, element, reason: refused.reason, error: &refused.error })
        };
        let parts = refused.iter().filter_map(part_of).collect();
        self.deliveries.letters_of_elements(parts)
    }

    /// A row's place among all rows of the batch.
    pub(super) fn place(&self, refused: &RefusedRow<Part>) -> usize {
        match refused.part {
            Part::Fresh(_) => refused.row,
            Part::Suspects => self.fresh.len() + refused.row,
        }
    }
}
