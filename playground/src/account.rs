//! The user a server runs as. Servers never run as root: Postgres refuses to, the others should not.

use std::path::Path;

use anyhow::{Context, anyhow};
use nix::unistd::{Gid, Uid, User, chown, geteuid};

/// An account of this machine that a server changes to when we are root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    uid: Uid,
    gid: Gid,
}

impl Account {
    /// The account a server's Debian package brings. `None` when we are not root: then the server runs as we do.
    ///
    /// # Errors
    /// When we are root and the account does not exist, that is, the package is missing.
    pub fn of_server(name: &str) -> anyhow::Result<Option<Self>> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let user =
            User::from_name(name).with_context(|| format!("look up user {name}"))?.ok_or_else(|| {
                anyhow!("there is no user {name}: is the Debian package installed? (make install)")
            })?;
        Ok(Some(Self { name: user.name, uid: user.uid, gid: user.gid }))
    }
}

/// Hands a file or directory to the server's account; nothing to do when there is none.
///
/// # Errors
/// When the owner cannot be changed.
pub fn give(path: &Path, account: Option<&Account>) -> anyhow::Result<()> {
    let Some(account) = account else { return Ok(()) };
    chown(path, Some(account.uid), Some(account.gid))
        .with_context(|| format!("give {} to {}", path.display(), account.name))
}

/// Creates a directory (0700) that belongs to the server's account.
///
/// # Errors
/// When it cannot be created.
pub fn private_dir(path: &Path, account: Option<&Account>) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("protect {}", path.display()))?;
    give(path, account)
}

/// Writes a file (0600) that belongs to the server's account.
///
/// # Errors
/// When it cannot be written.
pub fn private_file(path: &Path, text: &str, account: Option<&Account>) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("write {}", path.display()))?;
    give(path, account)
}
