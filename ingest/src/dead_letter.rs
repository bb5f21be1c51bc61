//! What could not be stored as a row, and why. Committed before the message is acknowledged.
//!
//! A letter weighs about what its message weighed: topic, error and payload are cut, and say so.

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::error_text::cut;
use crate::failure::WriteError;

/// Why. The names are public: `dead_letters.reason` and the metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    NotJson,
    MissingField,
    WrongType,
    TopicMismatch,
    TimestampOutOfRange,
    TooLarge,
    RejectedByDatabase,
    /// Another reading with this identity is stored.
    Conflict,
    /// The source's packet was malformed, and could be acknowledged all the same.
    MalformedPacket,
}

impl Reason {
    pub const ALL: [Self; 9] = [
        Self::NotJson,
        Self::MissingField,
        Self::WrongType,
        Self::TopicMismatch,
        Self::TimestampOutOfRange,
        Self::TooLarge,
        Self::RejectedByDatabase,
        Self::Conflict,
        Self::MalformedPacket,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotJson => "not_json",
            Self::MissingField => "missing_field",
            Self::WrongType => "wrong_type",
            Self::TopicMismatch => "topic_mismatch",
            Self::TimestampOutOfRange => "timestamp_out_of_range",
            Self::TooLarge => "too_large",
            Self::RejectedByDatabase => "rejected_by_database",
            Self::Conflict => "conflict",
            Self::MalformedPacket => "malformed_packet",
        }
    }
}

/// Longest topic of a letter, in bytes.
pub const MAX_TOPIC_BYTES: usize = 800;
/// What a letter takes besides its texts, in memory and in the table.
const ROW_BYTES: usize = 128;

/// One row of `dead_letters`.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Microseconds since 1970.
    pub received_at_us: i64,
    /// `mqtt` or `rabbitmq`.
    pub source: &'static str,
    pub topic: Bytes,
    pub reason: Reason,
    pub error: String,
    /// The message, or the one element of an array, as it came; cut when it was too large.
    pub payload: Bytes,
    /// Of a payload that was cut.
    pub original: Option<Original>,
}

/// What identifies a payload that is not stored as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Original {
    pub bytes: i64,
    pub sha256: Vec<u8>,
}

impl DeadLetter {
    /// Cuts topic, error and payload (to `max_payload` bytes) to what is stored.
    #[must_use]
    pub fn new(
        received_at_us: i64,
        source: &'static str,
        topic: &Bytes,
        reason: Reason,
        error: &str,
        payload: Bytes,
        max_payload: usize,
    ) -> Self {
        let original = (payload.len() > max_payload).then(|| Original {
            bytes: i64::try_from(payload.len()).unwrap_or(i64::MAX),
            sha256: Sha256::digest(&payload).to_vec(),
        });
        let kept = payload.len().min(max_payload);
        // Of its own: a slice would hold the whole message until the letter is committed.
        let payload = if original.is_some() {
            Bytes::copy_from_slice(payload.get(..kept).unwrap_or_default())
        } else {
            payload
        };
        let topic = topic.slice(..topic.len().min(MAX_TOPIC_BYTES));
        Self { received_at_us, source, topic, reason, error: cut(error.to_owned()), payload, original }
    }

    /// Bytes it takes in memory and in a statement, about.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.payload.len() + self.topic.len() + self.error.len() + ROW_BYTES
    }
}

/// The first letters that weigh at most `max_bytes` together; one at least.
#[must_use]
pub fn piece(letters: &[DeadLetter], max_bytes: usize) -> &[DeadLetter] {
    let mut bytes = 0;
    let fits = |letter: &&DeadLetter| {
        bytes += letter.weight();
        bytes <= max_bytes
    };
    let count = letters.iter().take_while(fits).count().max(1);
    letters.get(..count).unwrap_or(letters)
}

/// Text columns hold no NUL and only UTF-8; a broken topic is shown as far as it can be.
fn storable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "\u{fffd}")
}

/// What every encoding of a database can hold.
fn ascii(bytes: &[u8]) -> String {
    storable(bytes).escape_default().to_string()
}

/// Inserts the letters in the connection's current transaction, in one statement: take a [`piece`]. A letter must never be
/// what stops the pipeline, so texts that the database refuses are stored with everything but ASCII escaped. Returns whether they
/// were stored with all they have: when the table is nearly full they are not.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn insert(client: &Client, letters: &[DeadLetter]) -> Result<bool, WriteError> {
    client.batch_execute("SAVEPOINT letters").await?;
    match insert_as(client, letters, storable).await {
        Err(WriteError::Data { message, .. }) => {
            client.batch_execute("ROLLBACK TO letters").await?;
            let whole = insert_as(client, letters, ascii).await.map_err(of_the_table)?;
            tracing::error!(
                error = message,
                "the database refuses the text of a dead letter; it is stored escaped"
            );
            Ok(whole)
        }
        outcome => outcome.map_err(of_the_table),
    }
}

/// A letter is made by us and fits the table as we made it. What refuses it is a change of the table.
fn of_the_table(error: WriteError) -> WriteError {
    let refused = |words: &str| WriteError::Schema(format!("dead_letters: {words}"));
    match error {
        WriteError::Retry(_) | WriteError::Locked(_) | WriteError::Schema(_) => error,
        WriteError::Data { message, .. } | WriteError::Unknown(message) => refused(&message),
        WriteError::MissingPartition => refused("no partition takes a letter, not even a default one"),
        WriteError::Duplicate | WriteError::Swallowed { .. } => refused(&error.to_string()),
    }
}

/// Offers the table a letter, to find out whether it takes any. In a transaction that is rolled back.
///
/// # Errors
/// As [`insert`].
pub(crate) async fn offer(client: &Client) -> Result<(), WriteError> {
    let now_us = jiff::Timestamp::now().as_microsecond();
    let (topic, payload) = (Bytes::from_static(b"tier0/probe"), Bytes::from_static(b"{}"));
    let reason = Reason::RejectedByDatabase;
    let letter = DeadLetter::new(now_us, "mqtt", &topic, reason, "is this taken?", payload, 100);
    insert(client, &[letter]).await.map(drop)
}

async fn insert_as(
    client: &Client,
    letters: &[DeadLetter],
    text: impl Fn(&[u8]) -> String,
) -> Result<bool, WriteError> {
    // What is stored of a letter when the table is nearly full (ingest/src/maintenance/letters.rs); all of it without that row.
    const SQL: &str = "WITH storage AS (SELECT \
            coalesce((SELECT letters FROM public.dead_letter_storage), true) AS letters, \
            coalesce((SELECT payloads FROM public.dead_letter_storage), true) AS payloads), \
        stored AS (INSERT INTO public.dead_letters \
            (received_at, source, topic, reason, error, payload, payload_bytes, payload_sha256) \
            SELECT to_timestamp(us / 1000000.0), source, topic, reason, error, \
                CASE WHEN payloads THEN payload ELSE '' END, \
                coalesce(bytes, CASE WHEN NOT payloads THEN octet_length(payload) END), \
                coalesce(sha256, CASE WHEN NOT payloads THEN pg_catalog.sha256(payload) END) \
            FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[], $7::bigint[], $8::bytea[]) \
                AS letter (us, source, topic, reason, error, payload, bytes, sha256), storage \
            WHERE letters RETURNING 1) \
        SELECT (SELECT count(*) FROM stored), letters, payloads FROM storage";
    let received: Vec<i64> = letters.iter().map(|letter| letter.received_at_us).collect();
    let sources: Vec<&str> = letters.iter().map(|letter| letter.source).collect();
    let topics: Vec<String> = letters.iter().map(|letter| text(&letter.topic)).collect();
    let reasons: Vec<&str> = letters.iter().map(|letter| letter.reason.as_str()).collect();
    let errors: Vec<String> = letters.iter().map(|letter| text(letter.error.as_bytes())).collect();
    let payloads: Vec<&[u8]> = letters.iter().map(|letter| letter.payload.as_ref()).collect();
    let originals = || letters.iter().map(|letter| letter.original.as_ref());
    let lengths: Vec<Option<i64>> = originals().map(|original| Some(original?.bytes)).collect();
    let hashes: Vec<Option<&[u8]>> = originals().map(|original| Some(original?.sha256.as_slice())).collect();
    let parameters: [&(dyn ToSql + Sync); 8] =
        [&received, &sources, &topics, &reasons, &errors, &payloads, &lengths, &hashes];
    let row = client.query_one(SQL, &parameters).await?;
    let (stored, kept, whole): (i64, bool, bool) = (row.get(0), row.get(1), row.get(2));
    if !kept || usize::try_from(stored) == Ok(letters.len()) {
        Ok(kept && whole)
    } else {
        Err(WriteError::Schema(format!(
            "dead_letters kept {stored} of {} rows: a trigger, rule or policy?",
            letters.len()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_weighs_no_more_than_its_bounds() {
        let topic = Bytes::from(vec![b't'; 60_000]);
        let payload = Bytes::from(vec![b'p'; 3_000]);
        let error = "ü".repeat(10_000);
        let letter = DeadLetter::new(0, "mqtt", &topic, Reason::TooLarge, &error, payload.clone(), 1_000);
        assert_eq!((letter.topic.len(), letter.payload.len()), (MAX_TOPIC_BYTES, 1_000));
        assert!(letter.error.len() <= crate::error_text::MAX_ERROR_BYTES && letter.error.ends_with('…'));
        let original = letter.original.unwrap();
        assert_eq!(original.bytes, 3_000);
        assert_eq!(original.sha256, Sha256::digest(&payload).to_vec());
        let whole = DeadLetter::new(0, "mqtt", &topic, Reason::WrongType, "x", payload, 3_000);
        assert_eq!((whole.payload.len(), whole.original), (3_000, None));
    }

    #[test]
    fn pieces_are_bounded_and_never_empty() {
        let letter = |bytes: usize| {
            DeadLetter::new(0, "mqtt", &Bytes::new(), Reason::NotJson, "", vec![0; bytes].into(), usize::MAX)
        };
        let letters = [letter(500), letter(100), letter(700), letter(5_000)];
        assert_eq!(piece(&letters, 1_000).len(), 2);
        assert_eq!(piece(&letters[2..], 1_000).len(), 1);
        assert_eq!(piece(&letters[3..], 1_000).len(), 1, "one at least");
    }
}
