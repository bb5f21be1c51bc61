//! A batch of readings: encoded as messages are taken from the queue, and its way into the table.
//!
//! Fast path: one plain COPY, and a small merge for readings that were seen lately. When the fast path fails because a row
//! is stored already or refused by the database, `careful` finds the rows at fault and stores the rest.

mod careful;
mod encoded;

use std::time::Duration;

use deadpool_postgres::Client;
use futures_util::SinkExt;
use tokio::time::Instant;

use crate::batch::{self, Committed, Deliveries, Path, in_time};
use crate::census::Census;
use crate::copy;
use crate::dead_letter::DeadLetter;
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::reading::{self, Reading, Rejection, Rules, Visitor};
use crate::recent::Recent;
use encoded::Encoded;

/// The columns a reading fills, in the order they are encoded.
const COLUMNS: &str =
    "device_id, device_type, site_id, timestamp_utc, firmware, metrics, status, location, tags";

/// Readings and refused messages that are committed together.
#[derive(Debug)]
pub struct Batch {
    rules: Rules,
    deliveries: Deliveries,
    /// Readings not seen lately: plain COPY.
    fresh: Encoded,
    /// Readings seen lately, probably stored already: merged.
    suspects: Encoded,
    /// The row of `fresh` that made the fast path fail, and the database's words, when it named one.
    named: Option<(usize, String)>,
    census: Census,
}

impl batch::Batch for Batch {
    type Memory = Recent;

    fn new(source: &'static str, rules: Rules) -> Self {
        Self {
            rules,
            deliveries: Deliveries::new(source),
            fresh: Encoded::new(),
            suspects: Encoded::new(),
            named: None,
            census: Census::default(),
        }
    }

    fn clear(&mut self) {
        self.deliveries.clear();
        self.fresh.clear();
        self.suspects.clear();
        self.named = None;
        self.census.clear();
    }

    fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Decodes and encodes one message.
    fn push(&mut self, delivery: Delivery, now_us: i64, recent: &mut Recent) {
        let mut filling = Filling {
            delivery: &delivery,
            start: (self.fresh.mark(), self.suspects.mark(), self.deliveries.mark()),
            now_us,
            recent,
            fresh: &mut self.fresh,
            suspects: &mut self.suspects,
            deliveries: &mut self.deliveries,
        };
        let before = filling.fresh.len() + filling.suspects.len();
        reading::visit(&delivery.topic, &delivery.payload, &self.rules, &mut filling);
        self.census.add(&delivery.topic, self.fresh.len() + self.suspects.len() - before);
        self.deliveries.push(delivery);
    }

    fn deliveries(&self) -> &Deliveries {
        &self.deliveries
    }

    fn deliveries_mut(&mut self) -> &mut Deliveries {
        &mut self.deliveries
    }

    fn parts(&self) -> usize {
        self.fresh.len() + self.suspects.len() + self.deliveries.letters().len()
    }

    fn bytes(&self) -> usize {
        self.fresh.bytes() + self.suspects.bytes() + self.deliveries.letter_bytes()
    }

    fn timestamps(&self) -> impl Iterator<Item = i64> + '_ {
        self.fresh.timestamps().chain(self.suspects.timestamps())
    }

    fn census(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.census.iter()
    }

    fn seal(&mut self) {
        self.fresh.seal();
        self.suspects.seal();
    }

    async fn commit(
        &mut self,
        client: &mut Client,
        path: Path,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        if self.parts() == 0 {
            return Ok(Committed::default());
        }
        let outcome = match path {
            Path::Fast => in_time(patience, self.commit_fast(client)).await,
            // Many steps when many rows are refused: a deadline over all of them would begin again for ever.
            Path::Isolate | Path::Merge => self.commit_carefully(client, path, patience).await,
        };
        if matches!(
            outcome,
            Err(WriteError::Duplicate | WriteError::MissingPartition | WriteError::Data { .. })
        ) {
            in_time(patience, async { Ok(client.batch_execute("ROLLBACK").await?) }).await?;
        }
        outcome
    }
}

impl Batch {
    async fn commit_fast(&mut self, client: &Client) -> Result<Committed, WriteError> {
        let started = Instant::now();
        if self.fresh.is_empty() {
            client.batch_execute("BEGIN").await?;
            let rows = self.suspects.merge(client, 0, self.suspects.len()).await?;
            return self.finish(client, rows, &[], started).await;
        }
        let sql = format!("COPY device_telemetry ({COLUMNS}) FROM STDIN BINARY");
        let statement = client.prepare_cached(&sql).await?;
        // Both requests leave together; the server answers them in order.
        let (begun, sink) = tokio::join!(client.batch_execute("BEGIN"), client.copy_in(&statement));
        begun?;
        let sink = sink?;
        futures_util::pin_mut!(sink);
        let fed = async {
            for message in copy::messages(self.fresh.sealed()) {
                sink.feed(message).await?;
            }
            Ok::<(), tokio_postgres::Error>(())
        };
        // A server that refuses a row stops reading; its reason comes with the end of the COPY.
        let fed = fed.await;
        if !self.suspects.is_empty() || !self.deliveries.letters().is_empty() || fed.is_err() {
            let rows = sink.finish().await;
            let rows = self.note_named(rows)?;
            fed?;
            let merged = self.suspects.merge(client, 0, self.suspects.len()).await?;
            return self.finish(client, rows + merged, &[], started).await;
        }
        // COMMIT leaves with the end of the COPY. If the COPY failed, it is a rollback.
        let copy = async {
            let rows = sink.finish().await;
            (rows, Instant::now())
        };
        let ((rows, copied_at), committed) = tokio::join!(copy, client.batch_execute("COMMIT"));
        let rows = self.note_named(rows)?;
        committed?;
        let copied = copied_at.duration_since(started);
        Ok(Committed { rows, duplicates: 0, copied, committed: copied_at.elapsed() })
    }

    /// Remembers which row the database refused.
    fn note_named(&mut self, rows: Result<u64, tokio_postgres::Error>) -> Result<usize, WriteError> {
        let error = match rows {
            Ok(rows) => return Ok(usize::try_from(rows).unwrap_or(usize::MAX)),
            Err(error) => WriteError::from(error),
        };
        if let WriteError::Data { message, line: Some(line) } = &error {
            self.named = Some((*line, message.clone()));
        }
        Err(error)
    }

    /// After the rows: the dead letters, those of `refused` rows too, then COMMIT.
    async fn finish(
        &self,
        client: &Client,
        rows: usize,
        refused: &[DeadLetter],
        started: Instant,
    ) -> Result<Committed, WriteError> {
        let good = self.fresh.len() + self.suspects.len();
        self.deliveries.finish(client, good, rows, refused, started).await
    }
}

/// Fills a batch from one delivery.
struct Filling<'b> {
    delivery: &'b Delivery,
    /// Lengths of everything before this delivery.
    start: (encoded::Mark, encoded::Mark, batch::Mark),
    now_us: i64,
    recent: &'b mut Recent,
    fresh: &'b mut Encoded,
    suspects: &'b mut Encoded,
    deliveries: &'b mut Deliveries,
}

impl<'a> Visitor<'a> for Filling<'_> {
    fn reading(&mut self, reading: &Reading<'a>) {
        let rows = if self.recent.seen(&reading.device_id, reading.timestamp_us) {
            &mut *self.suspects
        } else {
            &mut *self.fresh
        };
        rows.push(reading, self.deliveries.next());
    }

    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        self.deliveries.refuse(self.delivery, part, (rejection.reason, rejection.error), self.now_us);
    }

    fn restart(&mut self) {
        let (fresh, suspects, deliveries) = self.start;
        self.fresh.truncate(fresh);
        self.suspects.truncate(suspects);
        self.deliveries.truncate(deliveries);
    }
}
