//! Who may do what in the database.

use anyhow::Context;

use crate::postgres::{DATABASE, Passwords, Postgres, Role};

/// On a new node: who connects, and the database.
pub(super) async fn create(primary: &Postgres, passwords: &Passwords) -> anyhow::Result<()> {
    let db = primary.admin().await?;
    // The passwords are hexadecimal digits of our own making: nothing to quote.
    db.batch_execute(&format!(
        "CREATE ROLE {owner} LOGIN PASSWORD '{}'; CREATE ROLE {replicator} LOGIN REPLICATION PASSWORD '{}';",
        passwords.of(Role::Owner),
        passwords.of(Role::Replicator),
        owner = Role::Owner.name(),
        replicator = Role::Replicator.name(),
    ))
    .await
    .context("create the roles")?;
    db.batch_execute(&format!("CREATE DATABASE {DATABASE} OWNER {}", Role::Owner.name()))
        .await
        .context("create the database")?;
    create_watchers(primary, passwords).await
}

/// The roles that only look; harmless where they are there already.
pub(super) async fn create_watchers(primary: &Postgres, passwords: &Passwords) -> anyhow::Result<()> {
    let db = primary.admin().await?;
    for (role, group) in [(Role::Monitor, "pg_monitor"), (Role::Reader, "pg_read_all_data")] {
        let name = role.name();
        let there = db
            .query_opt("SELECT 1 FROM pg_roles WHERE rolname = $1", &[&name])
            .await
            .context("look for the roles")?;
        let verb = if there.is_some() { "ALTER" } else { "CREATE" };
        db.batch_execute(&format!(
            "{verb} ROLE {name} LOGIN PASSWORD '{}'; GRANT {group} TO {name}; \
             ALTER ROLE {name} SET default_transaction_read_only = on; ALTER ROLE {name} SET statement_timeout = '30s'",
            passwords.of(role)
        ))
        .await
        .with_context(|| format!("create the role {name}"))?;
    }
    Ok(())
}
