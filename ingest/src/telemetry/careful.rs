//! The careful path: rows that are stored already left out, rows the database refuses found and dead-lettered, in one
//! transaction.

use std::time::Duration;

use deadpool_postgres::Client;
use tokio::time::Instant;

use super::Batch;
use super::encoded::Encoded;
use crate::batch::{Committed, Path, in_time};
use crate::dead_letter::DeadLetter;
use crate::failure::WriteError;
use crate::isolation::{Isolated, Range, Rows, isolate};
use crate::reading;

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

impl Rows for Batch {
    type Part = Part;

    async fn store(&self, client: &Client, range: Range<Part>) -> Result<usize, WriteError> {
        let rows = self.part(range.part);
        match range.part {
            Part::Suspects | Part::Fresh(How::Merge) => rows.merge(client, range.from, range.to).await,
            Part::Fresh(How::Copy) => {
                let copied = rows.copy(client, "device_telemetry", range.from, range.to).await?;
                Ok(usize::try_from(copied).unwrap_or(usize::MAX))
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
        in_time(patience, async { Ok(client.batch_execute("BEGIN").await?) }).await?;
        let isolated = self.sort_out(client, path, patience).await?;
        let letters: Vec<(usize, DeadLetter)> = isolated
            .refused
            .into_iter()
            .filter_map(|(part, row, message)| self.letter(part, row, message))
            .collect();
        let (deliveries, letters): (Vec<usize>, Vec<DeadLetter>) = letters.into_iter().unzip();
        let done = in_time(patience, self.finish(client, isolated.stored, &letters, started)).await?;
        self.deliveries.refused_by_database(deliveries);
        Ok(done)
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
    ) -> Result<Isolated<Part>, WriteError> {
        let how = if path == Path::Isolate { How::Copy } else { How::Merge };
        let fresh = Range { part: Part::Fresh(how), from: 0, to: self.fresh.len() };
        let suspects = Range { part: Part::Suspects, from: 0, to: self.suspects.len() };
        // The row that made the fast path fail need not be found again.
        match self.named.as_ref().filter(|(row, _)| path == Path::Isolate && *row < fresh.to) {
            Some((row, message)) => {
                let open = vec![suspects, Range { from: row + 1, ..fresh }, Range { to: *row, ..fresh }];
                let refused = vec![(fresh.part, *row, message.clone())];
                isolate(self, client, patience, open, refused).await
            }
            None => isolate(self, client, patience, vec![suspects, fresh], Vec::new()).await,
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
