//! A directory for one test's servers, which the servers' accounts can reach and which goes away afterwards.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

/// On a disk, world-traversable on every Debian: a home directory is not, and `/tmp` may be in memory.
const ROOT: &str = "/var/tmp";
const LOCK: &str = "scratch.lock";

/// Removed with everything in it when dropped, or renamed to `tier0-kept-..` when `TIER0_KEEP` is set. What a killed test left behind is removed
/// by the next [`Scratch::new`] of the same user. Drop the servers first: declare the scratch before them.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Scratch {
    /// # Errors
    /// When `/var/tmp` cannot be written.
    pub fn new() -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("tier0-scratch-{}-", geteuid());
        remove_abandoned(&prefix);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // Built under another name: a directory without its lock would look abandoned to others.
        let hidden = Path::new(ROOT).join(format!(".{prefix}{}-{count}", std::process::id()));
        let path = Path::new(ROOT).join(format!("{prefix}{}-{count}", std::process::id()));
        std::fs::create_dir(&hidden).with_context(|| format!("create {}", hidden.display()))?;
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o755))
            .with_context(|| format!("open up {}", hidden.display()))?;
        let file = File::create(hidden.join(LOCK)).context("create the scratch lock")?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| error)
            .context("lock the scratch directory")?;
        std::fs::rename(&hidden, &path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, _lock: lock })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::env::var_os("TIER0_KEEP").is_some() {
            // Under another name: the next scratch removes what nobody holds.
            let kept = PathBuf::from(self.path.display().to_string().replace("tier0-scratch", "tier0-kept"));
            match std::fs::rename(&self.path, &kept) {
                Ok(()) => tracing::info!(path = %kept.display(), "TIER0_KEEP is set: the directory stays"),
                Err(error) => tracing::warn!(path = %self.path.display(), %error, "not kept"),
            }
        } else if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the scratch directory");
        }
    }
}

fn remove_abandoned(prefix: &str) {
    if std::env::var_os("TIER0_KEEP").is_some() {
        return;
    }
    for entry in std::fs::read_dir(ROOT).into_iter().flatten().flatten() {
        if !entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)) {
            continue;
        }
        let Ok(file) = File::open(entry.path().join(LOCK)) else { continue };
        if let Ok(_abandoned) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            tracing::debug!(path = %entry.path().display(), %error, "cannot remove an abandoned scratch");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_removed_when_dropped_and_not_by_others_before() {
        let first = Scratch::new().unwrap();
        let second = Scratch::new().unwrap();
        assert!(first.path().is_dir(), "the second did not take the first for abandoned");
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
        assert!(second.path().is_dir());
    }
}
