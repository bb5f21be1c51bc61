//! Migrations, by refinery under an advisory lock (refinery itself takes none).

use anyhow::Context;
use tokio_postgres::Client;

mod embedded {
    #![allow(clippy::all, unreachable_pub, reason = "written by refinery's macro")]
    refinery::embed_migrations!("migrations");
}

/// Any fixed number does, as long as nobody else locks the same: the bytes of "tier0mig".
const MIGRATION_LOCK: i64 = 0x7469_6572_306d_6967;

/// Brings the database to the newest schema. Several callers at once wait for one another. A session lock, so that
/// a caller that dies releases it.
///
/// # Errors
/// When the database cannot be reached or a migration fails; what was applied before stays applied.
pub async fn migrate(client: &mut Client) -> anyhow::Result<()> {
    client
        .execute("SELECT pg_advisory_lock($1)", &[&MIGRATION_LOCK])
        .await
        .context("wait for the migration lock")?;
    let outcome = embedded::migrations::runner().run_async(client).await;
    client
        .execute("SELECT pg_advisory_unlock($1)", &[&MIGRATION_LOCK])
        .await
        .context("release the migration lock")?;
    let report = outcome.context("migrate the schema")?;
    for migration in report.applied_migrations() {
        tracing::info!(version = migration.version(), name = migration.name(), "migration applied");
    }
    Ok(())
}
