//! Migrations, by refinery under an advisory lock (refinery itself takes none), and what must hold before anything is
//! written: version, shape of the tables, rights.

mod check;
mod keeping;

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use refinery::Runner;
use refinery::error::Kind;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;

pub(crate) use check::are_ours;
pub use check::{Purpose, check};

mod embedded {
    #![allow(clippy::all, unreachable_pub, reason = "written by refinery's macro")]
    refinery::embed_migrations!("migrations");
}

/// Any fixed number does, as long as nobody else locks the same: the bytes of "tier0mig".
const MIGRATION_LOCK: i64 = 0x7469_6572_306d_6967;

/// Longest wait for an answer to whether the lock is free, and the time between two such questions.
const LOCK_ANSWER: Duration = Duration::from_secs(10);
const LOCK_AGAIN: Duration = Duration::from_millis(200);
/// Between two lines of the log while a migration is at work, here or elsewhere.
const SAY: Duration = Duration::from_secs(30);

/// Where refinery records what was applied. With the schema, so that no search path leads elsewhere.
const HISTORY: &str = "public.refinery_schema_history";

/// Brings the database to the newest schema. Several callers at once wait for one another. A session lock, so that
/// a caller that dies releases it.
///
/// # Errors
/// When the database cannot be reached, a migration fails, or the schema is not one that this program can bring up to
/// date; what was applied before stays applied.
pub async fn migrate(client: &mut Client) -> anyhow::Result<()> {
    lock(client).await?;
    let outcome = said_meanwhile(apply(client)).await;
    let unlocked = client
        .execute("SELECT pg_catalog.pg_advisory_unlock($1)", &[&MIGRATION_LOCK])
        .await
        .context("release the migration lock");
    // The cause first: on a connection that was lost nothing can be unlocked.
    outcome?;
    unlocked.map(drop)
}

/// Asked for again and again, and never waited for at the server: a wait that is given up would go on there without us.
async fn lock(client: &Client) -> anyhow::Result<()> {
    const SQL: &str = "SELECT pg_catalog.pg_try_advisory_lock($1)";
    let mut said: Option<Instant> = None;
    loop {
        let asked = timeout(LOCK_ANSWER, client.query_one(SQL, &[&MIGRATION_LOCK]));
        let row = asked
            .await
            .context("no answer about the migration lock")?
            .context("ask for the migration lock")?;
        if row.get(0) {
            return Ok(());
        }
        if said.is_none_or(|said| said.elapsed() >= SAY) {
            said = Some(Instant::now());
            tracing::info!("another process works on the schema; waiting for it");
        }
        sleep(LOCK_AGAIN).await;
    }
}

/// A migration of large tables takes its time: nobody should take it for a process that hangs, and kill it.
async fn said_meanwhile<T>(work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    tokio::pin!(work);
    loop {
        match timeout(SAY, &mut work).await {
            Ok(outcome) => return outcome,
            Err(_) => {
                tracing::warn!(since = ?begun.elapsed(), "the schema is being migrated; do not end this process")
            }
        }
    }
}

async fn apply(client: &mut Client) -> anyhow::Result<()> {
    check::may_make_tables(client).await?;
    look_elsewhere(client).await?;
    let report = match runner().run_async(client).await {
        Ok(report) => report,
        Err(error) => match error.kind() {
            Kind::MissingVersion(migration) => bail!(newer(migration.version())),
            Kind::DivergentVersion(applied, ours) => bail!(
                "migration {} was applied as \"{}\" and is not what this program has under that number (\"{}\"): the tables \
                 were made by another program or by a changed migration",
                applied.version(),
                applied.name(),
                ours.name()
            ),
            _ => return Err(error).context("migrate the schema"),
        },
    };
    // refinery's COMMIT of a transaction that has failed is no error. The record says what is really there.
    confirm(client).await?;
    for migration in report.applied_migrations() {
        tracing::info!(version = migration.version(), name = migration.name(), "migration applied");
    }
    Ok(())
}

fn runner() -> Runner {
    let mut runner = embedded::migrations::runner();
    runner.set_migration_table_name(HISTORY);
    runner
}

/// The newest migration that this program knows.
fn expected() -> i64 {
    runner().get_migrations().iter().map(|migration| i64::from(migration.version())).max().unwrap_or(0)
}

/// Whether the schema is the one this program was built for.
///
/// # Errors
/// One sentence that says which it is.
async fn confirm(client: &Client) -> anyhow::Result<()> {
    const READABLE: &str = "SELECT current_user::text, \
        pg_catalog.has_table_privilege(pg_catalog.to_regclass($1)::oid, 'SELECT')";
    let row = client.query_one(READABLE, &[&HISTORY]).await.context("look for the record of migrations")?;
    let (role, readable): (&str, Option<bool>) = (row.get(0), row.get(1));
    let readable =
        readable.with_context(|| format!("no migration was applied to this database: {}", who_migrates()))?;
    ensure!(readable, "role {role} may not read {HISTORY}: run GRANT SELECT ON {HISTORY} TO {role}");
    let sql = format!("SELECT max(version)::bigint FROM {HISTORY}");
    let found: i64 = client
        .query_one(&sql, &[])
        .await
        .context("read the record of migrations")?
        .get::<_, Option<i64>>(0)
        .unwrap_or(0);
    let expected = expected();
    if found > expected {
        bail!(newer(found));
    }
    ensure!(found == expected, "the schema is at version {found}, {expected} is needed: {}", who_migrates());
    Ok(())
}

fn newer(found: impl std::fmt::Display) -> String {
    format!(
        "the schema is at version {found}, this program knows versions up to {}: a newer program has migrated it; start that \
         version here too",
        expected()
    )
}

fn who_migrates() -> &'static str {
    "start mqtt-consumer with mqtt_consumer.migrate = true first"
}

/// Before there was a fixed schema, a schema named as the role took the tables. A second, empty set beside them would look
/// like a loss.
async fn look_elsewhere(client: &Client) -> anyhow::Result<()> {
    const SQL: &str = "SELECT n.nspname::text FROM pg_catalog.pg_class c \
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.relname = 'device_telemetry' AND c.relkind = 'p' AND n.nspname = current_user \
          AND pg_catalog.to_regclass('public.device_telemetry') IS NULL";
    if let Some(row) = client.query_opt(SQL, &[]).await.context("look for tables in another schema")? {
        let schema: &str = row.get(0);
        bail!(
            "the tables are in schema {schema}, not in public: move each of them, refinery_schema_history too, by ALTER TABLE \
             {schema}.NAME SET SCHEMA public"
        );
    }
    Ok(())
}
