//! What a new session must say of itself before anything is sent through it, and a shorter question for each later use.
//!
//! A session starts with our settings ([`wire::postgres`]). What it really has is read back in the statement that asks for
//! the node's role, so the check costs no round trip. What differs is set again; what then still differs, or no session can
//! mend (encoding, `fsync`), is refused with a sentence that says what to do.

use std::sync::LazyLock;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use wire::postgres::{self, CLIENT_ENCODING, CLIENT_MIN_MESSAGES, SEARCH_PATH, SYNCHRONOUS_COMMIT, Setting};

/// The oldest server that knows all settings of [`wire::postgres::SETTINGS`].
const OLDEST_VERSION: u32 = 14;

/// The control file lags behind a promotion; the name of the WAL file being written does not.
const STANDING: &str = "CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL ELSE \
    pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) END";

/// A setting of our own, by which a session is known as ours.
const MARK: &str = "pg_catalog.current_setting('tier0.session', true)";

/// Settings that only a superuser or the server's configuration can change. With one of these values a committed row can
/// vanish, so no session is opened.
const FATAL: &[(&str, &str, &str)] = &[
    ("fsync", "off", "a crash of the machine loses committed rows: set fsync = on in postgresql.conf"),
    (
        "zero_damaged_pages",
        "on",
        "a damaged page is emptied instead of reported: RESET it for the role, the database and the server",
    ),
    (
        "ignore_checksum_failure",
        "on",
        "damaged pages are taken for good ones: RESET it for the role, the database and the server",
    ),
];

/// By which this process knows its own sessions.
static OUR_MARK: LazyLock<String> = LazyLock::new(|| format!("{:016x}", rand::random::<u64>()));

static FULL_QUESTION: LazyLock<String> = LazyLock::new(|| {
    let fatal: Vec<String> =
        FATAL.iter().map(|(name, _, _)| format!("pg_catalog.current_setting('{name}')")).collect();
    // The mark is read before it is set. Values of settings come last: there are many of them.
    format!(
        "SELECT {STANDING}, {MARK}, pg_catalog.current_setting('server_encoding'), \
         pg_catalog.current_setting('server_version_num'), pg_catalog.current_database(), {}, {}; \
         SELECT pg_catalog.set_config('tier0.session', '{}', false)",
        fatal.join(", "),
        postgres::current_values(),
        OUR_MARK.as_str(),
    )
});

/// Settings that a trigger or a function can change within a session, and on which the promise rests.
const WATCHED: [Setting; 4] = [SYNCHRONOUS_COMMIT, CLIENT_MIN_MESSAGES, SEARCH_PATH, CLIENT_ENCODING];

static SHORT_QUESTION: LazyLock<String> = LazyLock::new(|| {
    // Those that are fatal may be changed by a reload of the configuration, for sessions that are open too.
    let names = FATAL.iter().map(|(name, _, _)| *name).chain(WATCHED.iter().map(|setting| setting.name));
    let values: Vec<String> =
        names.map(|name| format!("pg_catalog.current_setting('{name}', true)")).collect();
    format!("SELECT {STANDING}, {MARK}, {}", values.join(", "))
});

/// Why a session is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("{}", super::words::explain(.0))]
    Driver(#[from] tokio_postgres::Error),
    /// The session works, and what it would do is not what was promised. One sentence that says what to do.
    #[error("{0}")]
    Refused(String),
}

/// The timeline of a node, `None` while it is in recovery.
pub(super) type Role = Option<u32>;

/// Checks a session that nothing was sent through yet. `bare`: it was opened without our settings. False when it did not take
/// them at its start, as behind a pooler; it has them now.
///
/// # Errors
/// When it is lost, or refused in words.
pub(super) async fn greet(client: &Client, bare: bool) -> Result<bool, OpenError> {
    if bare {
        // Alone and first: with a statement_timeout of milliseconds the long statement would not end.
        client.batch_execute("SET statement_timeout = 0").await?;
        client.batch_execute(&postgres::set_all()).await?;
    }
    let row = ask(client, &FULL_QUESTION).await?;
    let mut values = Values { row: &row, next: 0 };
    values.take();
    judge(&mut values)?;
    let differed = different(&mut values, postgres::compared()).is_some();
    if differed {
        client.batch_execute(&postgres::set_all()).await?;
        let row = ask(client, &format!("SELECT {}", postgres::current_values())).await?;
        let mut values = Values { row: &row, next: 0 };
        if let Some(difference) = different(&mut values, postgres::compared()) {
            return Err(OpenError::Refused(difference));
        }
    }
    Ok(!bare && !differed)
}

/// Whether a session is one that nobody has used.
///
/// # Errors
/// When it is lost, or has been used.
pub(super) async fn unmarked(client: &Client) -> Result<(), OpenError> {
    let row = ask(client, &format!("SELECT {MARK}")).await?;
    match (Values { row: &row, next: 0 }).take() {
        None | Some("") => Ok(()),
        Some(_) => Err(OpenError::Refused(shared_session())),
    }
}

/// Asks a session that was checked before: what its node is now, and whether it is still the session it was.
///
/// # Errors
/// When it is lost, or refused in words.
pub(super) async fn role(client: &Client) -> Result<Role, OpenError> {
    let row = ask(client, &SHORT_QUESTION).await?;
    let mut values = Values { row: &row, next: 0 };
    let role = role_of(values.take());
    if values.take() != Some(OUR_MARK.as_str()) {
        return Err(OpenError::Refused(shared_session()));
    }
    none_is_fatal(&mut values)?;
    match different(&mut values, WATCHED.iter()) {
        Some(difference) => Err(OpenError::Refused(difference)),
        None => Ok(role),
    }
}

/// One request, without a prepared statement: one round trip, and a pooler cannot separate the two.
async fn ask(client: &Client, sql: &str) -> Result<SimpleQueryRow, OpenError> {
    let answers = client.simple_query(sql).await?;
    let row = answers.into_iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.ok_or_else(|| OpenError::Refused("Postgres answered a question without a row".into()))
}

/// The columns of an answer, one after the other.
struct Values<'r> {
    row: &'r SimpleQueryRow,
    next: usize,
}

impl Values<'_> {
    fn take(&mut self) -> Option<&str> {
        self.next += 1;
        self.row.try_get(self.next - 1).ok().flatten()
    }
}

fn role_of(hex: Option<&str>) -> Role {
    hex.and_then(|hex| u32::from_str_radix(hex, 16).ok())
}

/// What no session can set for itself.
fn judge(values: &mut Values<'_>) -> Result<(), OpenError> {
    let refused = |words: String| Err(OpenError::Refused(words));
    if values.take().is_some_and(|mark| !mark.is_empty()) {
        return refused(shared_session());
    }
    let encoding = values.take().unwrap_or_default().to_owned();
    let version: u32 = values.take().and_then(|version| version.parse().ok()).unwrap_or(0);
    let database = values.take().unwrap_or_default();
    if encoding != "UTF8" {
        return refused(format!(
            "database {database} has the encoding {encoding}, which cannot hold every reading: create one with \
             CREATE DATABASE .. ENCODING 'UTF8' TEMPLATE template0, and name it in database.name"
        ));
    }
    if version / 10_000 < OLDEST_VERSION {
        return refused(format!(
            "the server is Postgres {}; {OLDEST_VERSION} or newer is needed",
            version / 10_000
        ));
    }
    none_is_fatal(values)
}

fn none_is_fatal(values: &mut Values<'_>) -> Result<(), OpenError> {
    for (name, value, consequence) in FATAL {
        if values.take() == Some(value) {
            return Err(OpenError::Refused(format!("{name} is {value} on this server: {consequence}")));
        }
    }
    Ok(())
}

/// The first setting that is not what it must be, in words.
fn different<'s>(values: &mut Values<'_>, settings: impl Iterator<Item = &'s Setting>) -> Option<String> {
    for setting in settings {
        match values.take() {
            Some(value) if value != setting.value => {
                return Some(format!(
                    "this session has {} = '{value}' although '{}' was set: look for a login or event trigger, a trigger \
                     of our tables, or a pooler that changes it",
                    setting.name, setting.value
                ));
            }
            // A server that does not know the setting.
            _ => {}
        }
    }
    None
}

fn shared_session() -> String {
    "this session of the server was or is used by another client: a connection pooler in transaction or statement mode \
     is in between, or one in session mode that does not reset. Transactions, prepared statements and locks need a session of \
     their own: name Postgres itself in database.hosts, or set pool_mode = session and server_reset_query = DISCARD ALL"
        .into()
}

/// Whether the other side knows no start-up parameter `options`. Poolers say so with this code.
pub(super) fn refuses_options(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| {
        *error.code() == SqlState::PROTOCOL_VIOLATION && error.message().contains("startup parameter")
    })
}
