//! The two kinds of error, told apart in one place.
//!
//! Either the server, the network or a failover is at fault: the batch is kept and tried again, for as long as it
//! takes. Or the data is: the row is isolated. An error nobody knows counts as the first kind and is alarmed, since
//! trying again loses nothing.

use tokio_postgres::error::{DbError, ErrorPosition, SqlState};

/// What the writer does next.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Keep the batch, find the primary, try again.
    #[error("{0}")]
    Retry(String),
    /// As `Retry`, and nobody has thought of this one: raise an alarm.
    #[error("unknown error, tried again: {0}")]
    Unknown(String),
    /// Somebody holds a lock: as `Retry`, and no message's fault however long it takes.
    #[error("a lock is held by somebody else: {0}")]
    Locked(String),
    /// Some rows are stored already: merge instead.
    #[error("a row with this identity is stored already")]
    Duplicate,
    /// No partition takes the row's time: make it and try again.
    #[error("no partition for a reading's time")]
    MissingPartition,
    /// The database reported success and kept fewer rows than it was sent: merge, and look which are missing.
    #[error("the table kept {kept} of {sent} rows")]
    Swallowed { sent: usize, kept: usize },
    /// The tables refuse what they took before: somebody has changed them, or they are damaged. Hold, raise an alarm, try
    /// again.
    #[error("the tables no longer take what they took before: {0}")]
    Schema(String),
    /// The database refuses the data. `line` is the row within the COPY, from 0, when the error names it.
    #[error("{message}")]
    Data { message: String, line: Option<usize> },
}

impl WriteError {
    /// Whether the connection is usable after a rollback. Otherwise it is lost, or its state is unknown.
    #[must_use]
    pub fn keeps_connection(&self) -> bool {
        match self {
            Self::Retry(_) | Self::Unknown(_) => false,
            Self::Duplicate
            | Self::Locked(_)
            | Self::MissingPartition
            | Self::Swallowed { .. }
            | Self::Schema(_)
            | Self::Data { .. } => true,
        }
    }
}

impl From<tokio_postgres::Error> for WriteError {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => classify(db.code(), db),
            // No answer of the server: connection refused, reset, closed, timed out.
            None => Self::Retry(with_source(&error)),
        }
    }
}

fn with_source(error: &tokio_postgres::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// How a SQLSTATE is answered. Class 54 (program limits: an index row too large, a document nested too deep) is the
/// data's fault like 22 and 23.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Server,
    Locked,
    Damaged,
    Duplicate,
    MissingPartition,
    Data,
    Unknown,
}

/// Classifies by SQLSTATE. 23514 has two uses, and a trigger may raise it too: a missing partition is known by the function
/// of the server that reports it.
#[must_use]
pub fn kind(code: &str, from_partition_search: bool) -> Kind {
    match (code, code.get(..2)) {
        ("23505", _) => Kind::Duplicate,
        ("23514", _) if from_partition_search => Kind::MissingPartition,
        // Somebody holds a lock for longer than a batch waits for it.
        ("55P03", _) => Kind::Locked,
        // A damaged page of a table or an index: no row is bad because of it.
        ("XX001" | "XX002", _) => Kind::Damaged,
        // A read-only or recovering node: not the data's fault although class 25.
        // A transaction that has failed before, or is not there any more: it is begun again.
        ("25006" | "25P01" | "25P02" | "55006" | "55000", _) => Kind::Server,
        (_, Some("08" | "40" | "53" | "57" | "58")) => Kind::Server,
        (_, Some("22" | "23" | "54")) => Kind::Data,
        _ => Kind::Unknown,
    }
}

fn classify(code: &SqlState, error: &DbError) -> WriteError {
    let message = format!("{}: {}", code.code(), error.message());
    match kind(code.code(), error.routine() == Some("ExecFindPartition")) {
        Kind::Server => WriteError::Retry(message),
        Kind::Locked => WriteError::Locked(message),
        Kind::Damaged => WriteError::Schema(message),
        Kind::Duplicate => WriteError::Duplicate,
        Kind::MissingPartition => WriteError::MissingPartition,
        Kind::Data => {
            let detail = match error.detail() {
                Some(detail) => format!("{message} ({detail})"),
                None => message,
            };
            WriteError::Data { message: detail, line: copy_line(error) }
        }
        Kind::Unknown => WriteError::Unknown(message),
    }
}

/// The row a COPY failed at, from 0. Postgres puts it into the context: `COPY device_telemetry, line 17, column metrics`.
fn copy_line(error: &DbError) -> Option<usize> {
    if matches!(error.position(), Some(ErrorPosition::Original(_))) {
        return None;
    }
    line_in(error.where_()?)
}

fn line_in(context: &str) -> Option<usize> {
    let copy = context.lines().find(|line| line.starts_with("COPY "))?;
    let (_, after) = copy.split_once(", line ")?;
    let digits = after.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse::<usize>().ok()?.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sqlstate_has_one_answer() {
        for (code, from_partition_search, expected) in [
            ("08006", false, Kind::Server), // connection_failure
            ("08P01", false, Kind::Server), // protocol_violation
            ("25006", false, Kind::Server), // read_only_sql_transaction: a demoted primary
            ("25P01", false, Kind::Server), // no_active_sql_transaction
            ("25P02", false, Kind::Server), // in_failed_sql_transaction: COMMIT would have answered ROLLBACK
            ("40001", false, Kind::Server), // serialization_failure
            ("40P01", false, Kind::Server), // deadlock_detected
            ("53100", false, Kind::Server), // disk_full
            ("53300", false, Kind::Server), // too_many_connections
            ("55006", false, Kind::Server), // object_in_use
            ("55P03", false, Kind::Locked), // lock_not_available
            ("57014", false, Kind::Server), // query_canceled
            ("57P01", false, Kind::Server), // admin_shutdown
            ("57P02", false, Kind::Server), // crash_shutdown
            ("57P03", false, Kind::Server), // cannot_connect_now
            ("58030", false, Kind::Server), // io_error
            ("23505", false, Kind::Duplicate),
            ("23514", true, Kind::MissingPartition),
            ("23514", false, Kind::Data), // a CHECK constraint, or a trigger that uses its code
            ("22P02", false, Kind::Data), // invalid_text_representation
            ("22P05", false, Kind::Data), // untranslatable_character: \u0000
            ("22021", false, Kind::Data), // character_not_in_repertoire
            ("22003", false, Kind::Data), // numeric_value_out_of_range
            ("22P03", false, Kind::Data), // invalid_binary_representation
            ("23502", false, Kind::Data), // not_null_violation
            ("54000", false, Kind::Data), // program_limit_exceeded: index row too large
            ("54001", false, Kind::Data), // statement_too_complex: nested too deep
            ("28P01", false, Kind::Unknown), // invalid_password
            ("42P01", false, Kind::Unknown), // undefined_table
            ("XX000", false, Kind::Unknown),
            ("XX001", false, Kind::Damaged), // data_corrupted
            ("XX002", false, Kind::Damaged), // index_corrupted
            ("", false, Kind::Unknown),
        ] {
            assert_eq!(kind(code, from_partition_search), expected, "{code}");
        }
    }

    #[test]
    fn the_line_of_a_copy_is_found_in_the_context() {
        for (context, expected) in [
            ("COPY device_telemetry, line 17, column metrics", Some(16)),
            ("COPY staging, line 1", Some(0)),
            ("JSON data, line 1: {\nCOPY device_telemetry, line 3, column tags", Some(2)),
            ("SQL statement \"x\"", None),
            ("JSON data, line 1: {", None),
        ] {
            assert_eq!(line_in(context), expected, "{context}");
        }
    }
}
