//! What a cluster is made of: nodes, roles, the database; and copies of all that.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, bail};

use super::Options;
use crate::port::Port;
use crate::postgres::{DATABASE, Passwords, Postgres, Role};
use crate::shipped;

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

/// Database and roles as a deployment has them: by the same file.
pub(super) async fn create_roles(primary: &Postgres, passwords: &Passwords) -> anyhow::Result<()> {
    let roles = shipped::config("postgres/roles.sql")?;
    let db = primary.admin().await?;
    db.batch_execute(&format!("CREATE DATABASE {DATABASE}")).await.context("create the database")?;
    let db = primary.connect(Role::Admin).await?;
    for role in [Role::Owner, Role::Writer, Role::Reader, Role::Monitor, Role::Replicator] {
        let setting = format!("tier0.{}_password", role.name());
        let sql = "SELECT set_config($1, $2, false)";
        db.execute(sql, &[&setting, &passwords.of(role)]).await.context("hand a password in")?;
    }
    db.batch_execute(&roles).await.context("create the roles (config/postgres/roles.sql)")
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
