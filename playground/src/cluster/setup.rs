//! What a cluster is made of: nodes, roles, the database; and copies of all that.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, bail};

use super::Options;
use crate::port::Port;
use crate::postgres::{DATABASE, Passwords, Postgres, Role};

/// Who the failover orchestrator, if there was one, has made the primary.
pub(super) fn recorded_primary(dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(dir.join("orchestrator/state.json")).ok()?;
    let state: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(state.get("primary")?.as_str()?.to_owned())
}

pub(super) fn nodes(dir: &Path, options: &Options, passwords: &Passwords) -> anyhow::Result<Vec<Postgres>> {
    (0..=options.standbys)
        .map(|index| {
            let port = match options.ports.get(index) {
                Some(wanted) => Port::near(*wanted)?,
                None => Port::free()?,
            };
            Postgres::new(&format!("region{}", index + 1), dir, port, passwords.clone())
        })
        .collect()
}

pub(super) async fn create_roles(primary: &Postgres, passwords: &Passwords) -> anyhow::Result<()> {
    let db = primary.admin().await?;
    // The passwords are hexadecimal digits of our own making: nothing to quote. Each has what it needs and no more: none
    // is a superuser, makes roles or databases; only the replicator streams WAL.
    for (role, rights) in [
        (Role::Owner, ""),
        (Role::Replicator, "REPLICATION"),
        (Role::Monitor, "IN ROLE pg_monitor"),
        (Role::Reader, "IN ROLE pg_read_all_data"),
    ] {
        let (name, password) = (role.name(), passwords.of(role));
        db.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD '{password}' {rights}"))
            .await
            .with_context(|| format!("create the role {name}"))?;
    }
    db.batch_execute(&format!("CREATE DATABASE {DATABASE} OWNER {}", Role::Owner.name()))
        .await
        .context("create the database")?;
    let close = format!(
        "REVOKE ALL ON DATABASE {DATABASE} FROM PUBLIC; GRANT CONNECT ON DATABASE {DATABASE} TO monitor, reader"
    );
    db.batch_execute(&close).await.context("close the database to others")
}

/// Copies with owners and modes, sharing blocks where the file system can.
pub(super) async fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let output = tokio::process::Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .args([from, to])
        .stdin(Stdio::null())
        .output()
        .await
        .context("run cp")?;
    if !output.status.success() {
        bail!("copy {}: {}", from.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
