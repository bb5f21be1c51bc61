//! Readings in binary COPY format, with what is needed to find one of them again.

use bytes::{BufMut, Bytes, BytesMut};
use deadpool_postgres::Client;
use futures_util::SinkExt;

use super::COLUMNS;
use crate::copy;
use crate::failure::WriteError;
use crate::reading::Reading;

const FIELDS: i16 = 9;

/// Duplicates within the rows and with the table are left out by the second statement.
const CREATE_STAGING: &str = "CREATE TEMP TABLE IF NOT EXISTS telemetry_staging \
    (LIKE device_telemetry INCLUDING DEFAULTS) ON COMMIT DELETE ROWS";

#[derive(Debug)]
pub(super) struct Encoded {
    rows: Vec<Row>,
    /// Header, then rows, until sealed.
    buffer: BytesMut,
    /// Everything once sealed, trailer included.
    sealed: Bytes,
}

/// Where a row is.
#[derive(Debug, Clone, Copy)]
struct Row {
    /// End of its encoding in the buffer; it starts where the row before ends.
    end: usize,
    delivery: usize,
    timestamp_us: i64,
}

/// A place to go back to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    rows: usize,
    bytes: usize,
}

impl Encoded {
    pub(super) fn new() -> Self {
        let mut encoded = Self { rows: Vec::new(), buffer: BytesMut::new(), sealed: Bytes::new() };
        encoded.clear();
        encoded
    }

    /// The last holder of the sealed buffer gives its memory back; otherwise a new one is made.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        let sealed = std::mem::take(&mut self.sealed);
        if let Ok(buffer) = sealed.try_into_mut() {
            self.buffer = buffer;
        }
        self.buffer.clear();
        self.buffer.put_slice(copy::HEADER);
    }

    pub(super) fn push(&mut self, reading: &Reading<'_>, delivery: usize) {
        let buffer = &mut self.buffer;
        copy::row(buffer, FIELDS);
        copy::text(buffer, &reading.device_id);
        copy::text(buffer, &reading.device_type);
        copy::text(buffer, &reading.site_id);
        copy::timestamptz(buffer, reading.timestamp_us);
        match &reading.firmware {
            Some(firmware) => copy::text(buffer, firmware),
            None => copy::null(buffer),
        }
        copy::jsonb(buffer, reading.metrics);
        for document in [reading.status, reading.location, reading.tags] {
            match document {
                Some(document) => copy::jsonb(buffer, document),
                None => copy::null(buffer),
            }
        }
        self.rows.push(Row { end: self.buffer.len(), delivery, timestamp_us: reading.timestamp_us });
    }

    pub(super) fn mark(&self) -> Mark {
        Mark { rows: self.rows.len(), bytes: self.buffer.len() }
    }

    pub(super) fn truncate(&mut self, mark: Mark) {
        self.rows.truncate(mark.rows);
        self.buffer.truncate(mark.bytes);
    }

    pub(super) fn seal(&mut self) {
        self.buffer.put_slice(copy::TRAILER);
        self.sealed = std::mem::take(&mut self.buffer).freeze();
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// One complete COPY of all rows.
    pub(super) fn sealed(&self) -> Bytes {
        self.sealed.clone()
    }

    pub(super) fn timestamps(&self) -> impl Iterator<Item = i64> + '_ {
        self.rows.iter().map(|row| row.timestamp_us)
    }

    /// The delivery a row came in.
    pub(super) fn delivery(&self, row: usize) -> Option<usize> {
        self.rows.get(row).map(|row| row.delivery)
    }

    /// COPY of rows `from..to` into `table`, in the connection's transaction.
    pub(super) async fn copy(
        &self,
        client: &Client,
        table: &str,
        from: usize,
        to: usize,
    ) -> Result<u64, WriteError> {
        let sql = format!("COPY {table} ({COLUMNS}) FROM STDIN BINARY");
        let sink = client.copy_in::<_, Bytes>(&sql).await?;
        futures_util::pin_mut!(sink);
        let feed = async {
            sink.feed(Bytes::from_static(copy::HEADER)).await?;
            for message in copy::messages(self.slice(from, to)) {
                sink.feed(message).await?;
            }
            sink.feed(Bytes::from_static(copy::TRAILER)).await
        };
        let fed = feed.await;
        // A server that refuses a row stops reading; its reason comes with the end of the COPY.
        let rows = sink.finish().await?;
        fed?;
        Ok(rows)
    }

    /// Stores rows `from..to` that are not there yet, in the connection's transaction; returns how many.
    pub(super) async fn merge(&self, client: &Client, from: usize, to: usize) -> Result<usize, WriteError> {
        if from == to {
            return Ok(0);
        }
        client.batch_execute(CREATE_STAGING).await?;
        self.copy(client, "telemetry_staging", from, to).await?;
        let insert = format!(
            "WITH part AS (DELETE FROM telemetry_staging RETURNING {COLUMNS}) \
             INSERT INTO device_telemetry ({COLUMNS}) SELECT {COLUMNS} FROM part ON CONFLICT DO NOTHING"
        );
        let inserted = client.execute(&insert, &[]).await?;
        Ok(usize::try_from(inserted).unwrap_or(usize::MAX))
    }

    fn slice(&self, from: usize, to: usize) -> Bytes {
        let end_of = |row: usize| self.rows.get(row).map(|row| row.end);
        let start = from.checked_sub(1).and_then(end_of).unwrap_or(copy::HEADER.len());
        let end = to.checked_sub(1).and_then(end_of).unwrap_or(start);
        self.sealed.slice(start..end)
    }
}
