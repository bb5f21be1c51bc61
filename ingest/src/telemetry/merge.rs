//! The merge path: rows through a temporary table, duplicates left out, refused rows found and dead-lettered.
//!
//! One transaction. Ranges of rows are tried under a savepoint; a range the database refuses is split at the row the
//! error names, or else in half, until the refused rows stand alone. Rows before the named one are known to be good,
//! so the cost is at most twice a plain merge however many are refused.

use bytes::{BufMut, Bytes, BytesMut};
use deadpool_postgres::Client;
use futures_util::SinkExt;
use tokio::time::Instant;

use super::{Batch, COLUMNS, Committed};
use crate::copy;
use crate::dead_letter::{DeadLetter, Reason};
use crate::failure::WriteError;
use crate::reading;

const CREATE_STAGING: &str = "BEGIN; CREATE TEMP TABLE IF NOT EXISTS telemetry_staging \
    (LIKE device_telemetry INCLUDING DEFAULTS) ON COMMIT DELETE ROWS";

/// Part of a batch still to be stored.
struct Range {
    from: usize,
    to: usize,
}

impl Batch {
    pub(super) async fn commit_merged(&mut self, client: &Client) -> Result<Committed, WriteError> {
        let started = Instant::now();
        client.batch_execute(CREATE_STAGING).await?;
        let mut stored = 0;
        let mut refused: Vec<(usize, String)> = Vec::new();
        let mut open = vec![Range { from: 0, to: self.rows.len() }];
        while let Some(Range { from, to }) = open.pop() {
            if from == to {
                continue;
            }
            client.batch_execute("SAVEPOINT part").await?;
            match self.merge(client, from, to).await {
                Ok(inserted) => {
                    stored += inserted;
                    client.batch_execute("RELEASE part").await?;
                }
                Err(WriteError::Data { message, line }) => {
                    client.batch_execute("ROLLBACK TO part; RELEASE part").await?;
                    match line.map(|line| from + line).filter(|row| *row < to) {
                        Some(row) => {
                            refused.push((row, message));
                            open.push(Range { from: row + 1, to });
                            open.push(Range { from, to: row });
                        }
                        None if to - from == 1 => refused.push((from, message)),
                        None => {
                            let middle = from.midpoint(to);
                            open.push(Range { from: middle, to });
                            open.push(Range { from, to: middle });
                        }
                    }
                }
                Err(other) => return Err(other),
            }
        }
        let letters: Vec<DeadLetter> =
            refused.iter().filter_map(|(row, message)| self.letter(*row, message.clone())).collect();
        let done = Committed {
            rows: stored,
            duplicates: self.rows.len() - stored - refused.len(),
            ..Committed::default()
        };
        let done = self.finish(client, done, &letters, started).await?;
        for (row, _) in refused {
            if let Some(row) = self.rows.get(row) {
                self.rejected.push((row.delivery, Reason::RejectedByDatabase));
            }
        }
        Ok(done)
    }

    /// Stores rows `from..to` that are not there yet; returns how many.
    async fn merge(&self, client: &Client, from: usize, to: usize) -> Result<usize, WriteError> {
        let sql = format!("COPY telemetry_staging ({COLUMNS}) FROM STDIN BINARY");
        let insert = format!(
            "WITH part AS (DELETE FROM telemetry_staging RETURNING {COLUMNS}) \
             INSERT INTO device_telemetry ({COLUMNS}) SELECT {COLUMNS} FROM part ON CONFLICT DO NOTHING"
        );
        let sink = client.copy_in::<_, Bytes>(&sql).await?;
        futures_util::pin_mut!(sink);
        sink.feed(Bytes::from_static(copy::HEADER)).await?;
        for message in copy::messages(self.slice(from, to)) {
            sink.feed(message).await?;
        }
        let mut trailer = BytesMut::new();
        trailer.put_slice(copy::TRAILER);
        sink.feed(trailer.freeze()).await?;
        sink.finish().await?;
        let inserted = client.execute(&insert, &[]).await?;
        Ok(usize::try_from(inserted).unwrap_or(usize::MAX))
    }

    fn letter(&self, row: usize, error: String) -> Option<DeadLetter> {
        let delivery_number = self.rows.get(row)?.delivery;
        let delivery = self.deliveries.get(delivery_number)?;
        let before = self.rows.get(..row)?.iter().rev().take_while(|other| other.delivery == delivery_number);
        let part = reading::nth_part(&delivery.topic, &delivery.payload, &self.rules, before.count());
        Some(DeadLetter {
            received_at_us: wall_clock_of(delivery.received),
            source: self.source,
            topic: delivery.topic.clone(),
            reason: Reason::RejectedByDatabase,
            error,
            payload: delivery.payload.slice_ref(part),
        })
    }
}

/// The wall clock at a past moment of the monotonic one, microseconds since 1970.
fn wall_clock_of(moment: Instant) -> i64 {
    let ago = i64::try_from(moment.elapsed().as_micros()).unwrap_or(0);
    jiff::Timestamp::now().as_microsecond() - ago
}
