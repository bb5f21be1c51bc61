//! What could not be stored as a row, and why. Committed before the message is acknowledged.

use bytes::Bytes;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

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
}

impl Reason {
    pub const ALL: [Self; 7] = [
        Self::NotJson,
        Self::MissingField,
        Self::WrongType,
        Self::TopicMismatch,
        Self::TimestampOutOfRange,
        Self::TooLarge,
        Self::RejectedByDatabase,
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
        }
    }
}

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
    /// The message, or the one element of an array, as it came.
    pub payload: Bytes,
}

/// Text columns hold no NUL and only UTF-8; a broken topic is shown as far as it can be.
fn storable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "\u{fffd}")
}

/// Inserts the letters in the connection's current transaction.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn insert(client: &Client, letters: &[DeadLetter]) -> Result<(), WriteError> {
    const SQL: &str = "INSERT INTO dead_letters (received_at, source, topic, reason, error, payload) \
        SELECT to_timestamp(us / 1000000.0), source, topic, reason, error, payload \
        FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[]) \
        AS letter (us, source, topic, reason, error, payload)";
    // A letter may be as large as a whole message; a statement holds a bounded number of bytes.
    const MAX_BYTES: usize = 32 << 20;
    // What a letter takes besides its texts, in memory and in the statement.
    const ROW_BYTES: usize = 128;
    let mut rest = letters;
    while !rest.is_empty() {
        let mut bytes = 0;
        let count = rest
            .iter()
            .take_while(|letter| {
                bytes += letter.payload.len() + letter.topic.len() + letter.error.len() + ROW_BYTES;
                bytes <= MAX_BYTES
            })
            .count()
            .max(1);
        let (now, later) = rest.split_at(count);
        rest = later;
        let received: Vec<i64> = now.iter().map(|letter| letter.received_at_us).collect();
        let sources: Vec<&str> = now.iter().map(|letter| letter.source).collect();
        let topics: Vec<String> = now.iter().map(|letter| storable(&letter.topic)).collect();
        let reasons: Vec<&str> = now.iter().map(|letter| letter.reason.as_str()).collect();
        let errors: Vec<String> = now.iter().map(|letter| storable(letter.error.as_bytes())).collect();
        let payloads: Vec<&[u8]> = now.iter().map(|letter| letter.payload.as_ref()).collect();
        let parameters: [&(dyn ToSql + Sync); 6] =
            [&received, &sources, &topics, &reasons, &errors, &payloads];
        client.execute(SQL, &parameters).await?;
    }
    Ok(())
}
