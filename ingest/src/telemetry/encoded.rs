//! Readings in binary COPY format, with what is needed to find one of them again.

use bytes::{BufMut, Bytes, BytesMut};
use deadpool_postgres::Client;
use futures_util::SinkExt;

use super::COLUMNS;
use crate::audit::key::Key;
use crate::copy;
use crate::failure::WriteError;
use crate::reading::Reading;
use crate::transaction;

const FIELDS: i16 = 9;

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
    /// Its place in the message's array.
    element: u32,
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
        let (element, timestamp_us) = (reading.element, reading.timestamp_us);
        self.rows.push(Row { end: self.buffer.len(), delivery, element, timestamp_us });
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

    /// Device and time of a sealed row.
    pub(super) fn key(&self, row: usize) -> Option<Key> {
        let at_us = self.rows.get(row)?.timestamp_us;
        // A field count of two bytes, then the device's length in four.
        let encoded = self.slice(row, row + 1);
        let length = u32::from_be_bytes(encoded.get(2..6)?.try_into().ok()?);
        let id = encoded.get(6..)?.get(..usize::try_from(length).ok()?)?;
        Some(Key { id: std::str::from_utf8(id).ok()?.into(), at_us })
    }

    /// The delivery a row came in.
    pub(super) fn delivery(&self, row: usize) -> Option<usize> {
        self.rows.get(row).map(|row| row.delivery)
    }

    /// Its place in that delivery's array.
    pub(super) fn element(&self, row: usize) -> Option<u32> {
        self.rows.get(row).map(|row| row.element)
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
        let rows = transaction::finish_copy(sink).await?;
        fed?;
        Ok(rows)
    }

    fn slice(&self, from: usize, to: usize) -> Bytes {
        let end_of = |row: usize| self.rows.get(row).map(|row| row.end);
        let start = from.checked_sub(1).and_then(end_of).unwrap_or(copy::HEADER.len());
        let end = to.checked_sub(1).and_then(end_of).unwrap_or(start);
        self.sealed.slice(start..end)
    }
}
