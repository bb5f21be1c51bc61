//! Asks Postgres many times a second how it is, and commits the markers of a primary.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::agent::local::{Local, Ready, Session};
use crate::agent::shared::Shared;
use crate::priority;
use crate::protocol::Postmaster;

/// A sample that takes longer is given up, with its session.
const LIMIT: Duration = Duration::from_secs(1);
/// Making the schema waits for the standbys; the next try comes anyway.
const PREPARE: Duration = Duration::from_secs(10);
const RECONNECT: Duration = Duration::from_millis(10);

/// What the agent keeps in Postgres: the epochs and the marker. In database `postgres`, so that the application's own
/// owner cannot touch it. The replication role may read files for `pg_rewind`.
///
/// Made by whoever comes first, the markers or an order; the other waits: `IF NOT EXISTS` does not see what is not committed.
const SCHEMA: &str = "
SELECT pg_advisory_xact_lock(hashtext('tier0_failover'));
CREATE SCHEMA IF NOT EXISTS tier0_failover;
CREATE TABLE IF NOT EXISTS tier0_failover.epoch (epoch bigint PRIMARY KEY, node text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE IF NOT EXISTS tier0_failover.marker (one boolean PRIMARY KEY DEFAULT true CHECK (one), number bigint NOT NULL);
INSERT INTO tier0_failover.marker (number) VALUES (0) ON CONFLICT DO NOTHING;
";

/// Lets `pg_rewind` read through an ordinary role.
#[must_use]
pub fn grants(role: &str) -> String {
    let role = role.replace('"', "\"\"");
    [
        "pg_ls_dir(text, boolean, boolean)",
        "pg_stat_file(text, boolean)",
        "pg_read_binary_file(text)",
        "pg_read_binary_file(text, bigint, bigint, boolean)",
    ]
    .iter()
    .map(|function| format!("GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO \"{role}\";\n"))
    // Before a copy it asks how large it will be.
    .chain([format!("GRANT pg_read_all_stats TO \"{role}\";\n")])
    .collect()
}

/// Samples until the token is cancelled.
pub async fn sample(
    shared: Arc<Shared>,
    local: Local,
    ready: Arc<Ready>,
    every: Duration,
    shutdown: CancellationToken,
) {
    let mut session: Option<(u64, Session)> = None;
    let mut pause = Duration::ZERO;
    // The life of Postgres in which that was tried; they are counted from 1.
    let mut hastened = 0;
    loop {
        // A change of state (a start, a reload) is a reason to look at once.
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let life = shared.life();
        let open = matches!(
            shared.status().postmaster,
            Postmaster::Starting | Postmaster::Running | Postmaster::Stopping
        );
        if !open {
            session = None;
            let seq = shared.status().seq;
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = shared.newer_than(seq, LIMIT) => {}
            }
            pause = Duration::ZERO;
            continue;
        }
        let current = match session.take().filter(|(of, _)| *of == life) {
            Some((_, session)) => Some(session),
            None => local.open().await.map_err(|error| shared.trouble(life, format!("{error:#}"))).ok(),
        };
        pause = RECONNECT;
        if let Some(current) = current {
            match current.sample(LIMIT).await {
                Ok(sample) => {
                    shared.sample(life, sample);
                    ready.warm().await;
                    let kept = if std::mem::replace(&mut hastened, life) == life {
                        Some(current)
                    } else {
                        hasten(current).await
                    };
                    session = kept.map(|kept| (life, kept));
                    pause = every;
                }
                Err(error) => shared.trouble(life, format!("{error:#}")),
            }
        }
    }
}

/// Puts a standby's replay ahead of other work. A session that did not answer is of no more use.
async fn hasten(session: Session) -> Option<Session> {
    match session.replays(LIMIT).await {
        Ok(pid) => {
            pid.into_iter().for_each(priority::first_of);
            Some(session)
        }
        Err(error) => {
            tracing::debug!(error = format!("{error:#}"), "replay keeps its priority");
            None
        }
    }
}

/// Makes the schema if it is missing.
///
/// # Errors
/// When Postgres refuses; while commits wait for a standby this waits too.
pub async fn prepare(session: &Session, replication_role: &str, limit: Duration) -> anyhow::Result<()> {
    let sql = "SELECT to_regclass('tier0_failover.marker') IS NOT NULL";
    let found = timeout(LIMIT, session.client.query_one(sql, &[])).await.context("look for the schema")??;
    if !found.try_get::<_, bool>(0)? {
        session.run(&format!("BEGIN; {SCHEMA} {} COMMIT", grants(replication_role)), limit).await?;
    }
    Ok(())
}

/// Commits markers while this node leads. Each waits for the standbys as any commit does, however long; the number of the
/// last one acknowledged is what a new primary must have.
pub async fn mark(
    shared: Arc<Shared>,
    local: Local,
    replication_role: String,
    every: Duration,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
        if !shared.status().is_writable() {
            continue;
        }
        let life = shared.life();
        let session = match local.open().await {
            Ok(session) => session,
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "no session for markers");
                continue;
            }
        };
        let patience = session.run("SET lock_timeout = '1s'", LIMIT);
        if let Err(error) = patience.await {
            tracing::debug!(error = format!("{error:#}"), "no session for markers");
            continue;
        }
        if let Err(error) = prepare(&session, &replication_role, PREPARE).await {
            tracing::warn!(error = format!("{error:#}"), "no schema for markers yet");
            continue;
        }
        loop {
            shared.pending(true);
            let marked = tokio::select! {
                () = shutdown.cancelled() => return,
                marked = session.client.query_one(MARK, &[]) => marked,
            };
            match marked {
                Ok(row) => acknowledge(&shared, life, &row),
                // Somebody holds a lock on it. That is no evidence against the primary, which commits other things.
                Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                    tracing::warn!("somebody holds a lock on tier0_failover.marker");
                    let committed = tokio::select! {
                        () = shutdown.cancelled() => return,
                        committed = session.client.batch_execute(BEAT) => committed,
                    };
                    if committed.is_ok() {
                        shared.beat();
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "marker not committed");
                    break;
                }
            }
            shared.pending(false);
            if timeout(every, shutdown.cancelled()).await.is_ok() {
                return;
            }
            if shared.life() != life {
                break;
            }
        }
        shared.pending(false);
    }
}

/// The position is of before the commit: whoever has acknowledged it has at least so much.
pub const MARK: &str = "UPDATE tier0_failover.marker SET number = number + 1 \
     RETURNING number, pg_current_wal_insert_lsn()::text";
/// A commit that needs no table.
const BEAT: &str = "SELECT pg_logical_emit_message(true, 'tier0_failover', '')";

/// Notes a committed marker.
pub fn acknowledge(shared: &Shared, life: u64, row: &Row) {
    let number: i64 = row.try_get(0).unwrap_or(0);
    let position: &str = row.try_get(1).unwrap_or_default();
    shared.marker(life, u64::try_from(number).unwrap_or(0), position.parse().unwrap_or_default());
}
