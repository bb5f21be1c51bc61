//! What the database remembers of the sessions that a broker holds for `mqtt-consumer`: table `mqtt_sessions`.
//!
//! Not on the way of a reading. Each call takes one connection for a moment and gives up after the commit timeout.

use deadpool_postgres::Client;
use jiff::Timestamp;
use tokio::time::timeout;
use tokio_postgres::types::ToSql;

use crate::database::Database;
use crate::failure::WriteError;

/// Which session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub client_id: String,
    /// `host:port`.
    pub broker: String,
}

/// A session that there should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// What it was last subscribed to.
    pub filter: String,
    /// When a consumer was last known to be subscribed.
    pub last_seen: Timestamp,
    /// When it was last found lost.
    pub lost_at: Option<Timestamp>,
}

/// What is known of a client id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    pub session: Option<Session>,
    /// Other brokers that should have a session under this client id.
    pub elsewhere: Vec<String>,
    /// Other client ids with a session at this broker that nobody uses, and when that was last different.
    pub left: Vec<(String, Timestamp)>,
}

/// A consumer that is there writes about once a minute.
const LEFT_AFTER: &str = "interval '5 minutes'";

/// What is remembered of this client id, and of others that were left. Sessions that were ended on purpose are not.
///
/// # Errors
/// When the database does not answer, or has no such table yet.
pub async fn load(database: &Database, key: &Key) -> Result<Known, WriteError> {
    const SQL: &str = "SELECT broker, filter, last_seen, lost_at FROM public.mqtt_sessions \
        WHERE client_id = $1 AND ended_at IS NULL ORDER BY broker";
    let mut known = Known::default();
    for row in rows(database, SQL, &[&key.client_id]).await? {
        let broker: String = row.get(0);
        if broker == key.broker {
            known.session = Some(Session { filter: row.get(1), last_seen: row.get(2), lost_at: row.get(3) });
        } else {
            known.elsewhere.push(broker);
        }
    }
    // The longest that a session is kept by default. More than a few would only fill the log.
    let left = format!(
        "SELECT client_id, last_seen FROM public.mqtt_sessions WHERE broker = $1 AND client_id <> $2 AND ended_at IS NULL \
         AND last_seen BETWEEN now() - interval '7 days' AND now() - {LEFT_AFTER} ORDER BY last_seen DESC LIMIT 10"
    );
    for row in rows(database, &left, &[&key.broker, &key.client_id]).await? {
        known.left.push((row.get(0), row.get(1)));
    }
    Ok(known)
}

/// Remembers that the process `holder` is subscribed now, and when the session before this one was lost. Returns the process
/// that was subscribed last.
///
/// # Errors
/// As [`load`].
pub async fn save(
    database: &Database,
    key: &Key,
    filter: &str,
    holder: &str,
    lost_at: Option<Timestamp>,
) -> Result<Option<String>, WriteError> {
    const SQL: &str = "WITH before AS (SELECT holder FROM public.mqtt_sessions WHERE client_id = $1 AND broker = $2) \
        INSERT INTO public.mqtt_sessions AS known (client_id, broker, filter, holder, first_seen, last_seen, lost_at) \
        VALUES ($1, $2, $3, $4, now(), now(), $5) \
        ON CONFLICT (client_id, broker) DO UPDATE SET filter = excluded.filter, holder = excluded.holder, \
            last_seen = excluded.last_seen, lost_at = coalesce(excluded.lost_at, known.lost_at), \
            first_seen = CASE WHEN known.ended_at IS NULL THEN known.first_seen ELSE excluded.first_seen END, \
            ended_at = NULL \
        RETURNING (SELECT holder FROM before)";
    let rows = rows(database, SQL, &[&key.client_id, &key.broker, &filter, &holder, &lost_at]).await?;
    Ok(rows.first().and_then(|row| row.get(0)))
}

/// Remembers when the session was found lost, whether or not there is a new one that works.
///
/// # Errors
/// As [`load`].
pub async fn note_loss(database: &Database, key: &Key, at: Timestamp) -> Result<(), WriteError> {
    const SQL: &str = "UPDATE public.mqtt_sessions SET lost_at = $3 WHERE client_id = $1 AND broker = $2";
    rows(database, SQL, &[&key.client_id, &key.broker, &at]).await.map(drop)
}

/// Remembers that the session was ended on purpose.
///
/// # Errors
/// As [`load`].
pub async fn end(database: &Database, key: &Key) -> Result<(), WriteError> {
    const SQL: &str = "UPDATE public.mqtt_sessions SET ended_at = now() WHERE client_id = $1 AND broker = $2";
    rows(database, SQL, &[&key.client_id, &key.broker]).await.map(drop)
}

async fn rows(
    database: &Database,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Vec<tokio_postgres::Row>, WriteError> {
    let client = database.client().await?;
    let patience = database.commit_timeout();
    match timeout(patience, client.query(sql, parameters)).await {
        Ok(answer) => Ok(answer?),
        Err(_) => {
            // Its state is unknown: not back into the pool.
            drop(Client::take(client));
            Err(WriteError::Retry(format!("no answer from Postgres within {patience:?}")))
        }
    }
}
