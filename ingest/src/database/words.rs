//! Errors of opening a session, as sentences that say what to do.

use tokio_postgres::error::{DbError, SqlState};

/// The server's own words, and our advice where the cause is one that somebody must mend.
pub(super) fn explain(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => match advice(error) {
            Some(advice) => format!("{} ({}): {advice}", error.message(), error.code().code()),
            None => format!("{} ({})", error.message(), error.code().code()),
        },
        None => full(error),
    }
}

fn advice(error: &DbError) -> Option<&'static str> {
    let is = |code: &SqlState| error.code() == code;
    if is(&SqlState::INVALID_PASSWORD) {
        Some("check database.user and database.password; ALTER ROLE .. PASSWORD changes it in Postgres")
    } else if is(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) {
        Some("check database.user, and that pg_hba.conf has a line for this role, database and address")
    } else if is(&SqlState::INVALID_CATALOG_NAME) {
        Some("check database.name, or create the database with ENCODING 'UTF8'")
    } else if is(&SqlState::INSUFFICIENT_PRIVILEGE) {
        Some("GRANT CONNECT ON DATABASE .. TO the role of database.user")
    } else if is(&SqlState::TOO_MANY_CONNECTIONS) {
        Some("raise max_connections, or the role's or database's CONNECTION LIMIT")
    } else if is(&SqlState::UNDEFINED_OBJECT) {
        Some("Postgres 14 or newer is needed")
    } else if is(&SqlState::UNDEFINED_FILE) {
        Some("a library that the server loads for each session is missing: see session_preload_libraries")
    } else {
        None
    }
}

/// An error with its causes.
pub(super) fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}
