//! The orchestrator's directory: its state, its history, and the lock that keeps a second one out.
//!
//! The lock is the kernel's (flock): it goes when the process does, however it ends, and never before.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use nix::fcntl::{Flock, FlockArg};

use crate::state::State;

/// Holds the directory for one process.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Store {
    /// Takes the directory.
    ///
    /// # Errors
    /// When another process has it, or it cannot be written.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let path = dir.join("lock");
        let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            anyhow!("another orchestrator holds {} ({error}); only one may act", path.display())
        })?;
        Ok(Self { dir: dir.to_owned(), _lock: lock })
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The state, or `None` at the first start.
    ///
    /// # Errors
    /// When it cannot be read or contradicts itself. Never answered with a fresh one: that would forget who is primary.
    pub fn load(&self) -> anyhow::Result<Option<State>> {
        let path = self.dir.join("state.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let state: State =
            serde_json::from_str(&text).with_context(|| format!("understand {}", path.display()))?;
        state.check().map_err(|error| anyhow!("{}: {error}", path.display()))?;
        Ok(Some(state))
    }

    /// Returns when the state would survive a power failure.
    ///
    /// # Errors
    /// When it cannot be written; the state before is then still there.
    pub fn save(&self, state: &State) -> anyhow::Result<()> {
        state.check().map_err(|error| anyhow!("refused to save: {error}"))?;
        write(&self.dir, "state.json", &serde_json::to_vec_pretty(state).context("write the state")?)
    }
}

/// Replaces a file: the old or the new content is there, never a part, never nothing.
///
/// # Errors
/// When it cannot be written.
pub fn write(dir: &Path, name: &str, content: &[u8]) -> anyhow::Result<()> {
    let (path, temporary) = (dir.join(name), dir.join(format!("{name}.new")));
    let result = (|| {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)?;
        File::open(dir)?.sync_all()
    })();
    result.with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_holds_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let error = Store::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("only one may act"), "{error}");
        drop(store);
        Store::open(dir.path()).unwrap();
    }

    #[test]
    fn state_is_what_was_saved_and_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.load().unwrap(), None);
        let mut state = State::first("region1".into(), "s".into(), ["region2".to_owned()].into());
        state.confirm("region2");
        store.save(&state).unwrap();
        assert_eq!(store.load().unwrap(), Some(state.clone()));
        state.sync_set.insert("region3".into());
        assert!(store.save(&state).is_err(), "the invariant does not hold");
        std::fs::write(dir.path().join("state.json"), "{}").unwrap();
        assert!(store.load().is_err());
    }
}
