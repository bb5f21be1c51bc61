//! The directory `.tier0/`: the lock against a second `up`, what runs now, and where the data is.
//!
//! Servers that run as users of their own must reach their data. A clone below a home directory of mode 0700 they
//! cannot reach; then the data lies in `/var/tmp` and `.tier0/data` is a link to it. Nobody's home is opened up.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use playground::process::Process;

/// Data of earlier runs that waits to be deleted.
const OLD: &str = "old-";

/// `.tier0/`.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
    data: PathBuf,
}

/// What a running `up` has started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The `up` itself.
    pub up: Option<Process>,
    pub processes: Vec<Process>,
}

/// What the verification of a run must know beside the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Rows of earlier runs were written by earlier transactions.
    pub first_transaction: u32,
    /// How long the consumer's tables keep a reading.
    #[serde(default)]
    pub retention: Option<Duration>,
}

/// Held by the one command that owns the servers.
pub type Lock = Flock<File>;

impl Home {
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
        let root = std::fs::canonicalize(root).with_context(|| format!("find {}", root.display()))?;
        let link = root.join("data");
        if !link.exists() {
            // A link to a directory that somebody cleaned away.
            drop(std::fs::remove_file(&link));
            if !geteuid().is_root() || reachable(&root) {
                make(&link)?;
            } else {
                let mut hash = DefaultHasher::new();
                root.hash(&mut hash);
                let elsewhere = PathBuf::from(format!("/var/tmp/tier0-{:016x}", hash.finish()));
                make(&elsewhere)?;
                symlink(&elsewhere, &link).with_context(|| format!("link {}", link.display()))?;
            }
        }
        let data = std::fs::canonicalize(&link).with_context(|| format!("find {}", link.display()))?;
        let owner = std::fs::metadata(&data).with_context(|| format!("look at {}", data.display()))?.uid();
        if owner != geteuid().as_raw() {
            bail!("{} belongs to user {owner}, not to us", data.display());
        }
        Ok(Self { root, data })
    }

    /// Where servers keep their data and logs.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Whether the data lies outside, because servers cannot reach `.tier0/`.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        !self.data.starts_with(&self.root)
    }

    #[must_use]
    pub fn ledger(&self) -> PathBuf {
        self.data.join("ledger.json")
    }

    /// That of the user sessions.
    #[must_use]
    pub fn session_ledger(&self) -> PathBuf {
        self.data.join("sessions.json")
    }

    /// The right to own the servers; `None` while another command has it. The kernel frees it however that one ends.
    ///
    /// # Errors
    /// When the lock file cannot be opened.
    pub fn lock(&self) -> anyhow::Result<Option<Lock>> {
        let path = self.root.join("lock");
        let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok())
    }

    /// Sets aside what earlier runs left. Deleting gigabytes takes seconds and keeps the disk busy for the servers that
    /// are about to start, so [`Home::delete_old`] does that at the end. Only with the lock held.
    ///
    /// # Errors
    /// When something cannot be moved.
    pub fn clear(&self, _lock: &Lock) -> anyhow::Result<()> {
        let free = (0..u32::MAX).map(|n| self.data.join(format!("{OLD}{n}"))).find(|path| !path.exists());
        let old = free.context("too much is set aside")?;
        std::fs::create_dir(&old).with_context(|| format!("create {}", old.display()))?;
        for path in self.entries()?.into_iter().filter(|path| !is_old(path)) {
            let name = path.file_name().context("an entry has a name")?;
            std::fs::rename(&path, old.join(name))
                .with_context(|| format!("set {} aside", path.display()))?;
        }
        Ok(())
    }

    /// Deletes what was set aside, by this run or one that was killed. Only with the lock held.
    ///
    /// # Errors
    /// When something cannot be deleted.
    pub fn delete_old(&self, _lock: &Lock) -> anyhow::Result<()> {
        for path in self.entries()?.into_iter().filter(|path| is_old(path)) {
            std::fs::remove_dir_all(&path).with_context(|| format!("delete {}", path.display()))?;
        }
        Ok(())
    }

    fn entries(&self) -> anyhow::Result<Vec<PathBuf>> {
        std::fs::read_dir(&self.data)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .with_context(|| format!("read {}", self.data.display()))
    }

    /// The last run, if there was one on this data.
    ///
    /// # Errors
    /// When the file is not ours.
    pub fn run(&self) -> anyhow::Result<Option<Run>> {
        match std::fs::read_to_string(self.data.join("run.json")) {
            Ok(text) => serde_json::from_str(&text).map(Some).context("read run.json"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("read run.json"),
        }
    }

    /// # Errors
    /// When the file cannot be written.
    pub fn write_run(&self, run: Run) -> anyhow::Result<()> {
        let text = serde_json::to_string(&run).context("write run.json")?;
        std::fs::write(self.data.join("run.json"), text).context("write run.json")
    }

    /// What runs, as last written.
    ///
    /// # Errors
    /// When the file is not ours.
    pub fn state(&self) -> anyhow::Result<State> {
        match std::fs::read_to_string(self.state_file()) {
            Ok(text) => serde_json::from_str(&text).context("read state.json"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(State::default()),
            Err(error) => Err(error).context("read state.json"),
        }
    }

    /// Replaces it as a whole.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_state(&self, state: &State) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(state).context("write state.json")?;
        let new = self.root.join("state.json.new");
        std::fs::write(&new, text).with_context(|| format!("write {}", new.display()))?;
        std::fs::rename(&new, self.state_file()).context("replace state.json")
    }

    fn state_file(&self) -> PathBuf {
        self.root.join("state.json")
    }
}

fn is_old(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(OLD))
}

/// Whether every user can pass through all directories above and into this one.
fn reachable(path: &Path) -> bool {
    path.ancestors()
        .all(|dir| std::fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0))
}

fn make(path: &Path) -> anyhow::Result<()> {
    match std::fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            // In a directory that everybody can write, somebody may have put a link there.
            let meta =
                std::fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?;
            if !meta.is_dir() || meta.uid() != geteuid().as_raw() {
                bail!("{} is not a directory of ours", path.display());
            }
        }
        Err(error) => return Err(error).with_context(|| format!("create {}", path.display())),
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .with_context(|| format!("open up {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time_and_state_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(&dir.path().join(".tier0")).unwrap();
        let lock = home.lock().unwrap().expect("nobody has it");
        assert!(Home::open(&dir.path().join(".tier0")).unwrap().lock().unwrap().is_none());
        assert_eq!(home.state().unwrap(), State::default());
        let me = Process::new("me", i32::try_from(std::process::id()).unwrap(), 1, Path::new("x"));
        assert!(me.lives());
        assert!(!Process { started: me.started + 1, ..me.clone() }.lives(), "another process with our pid");
        let state = State { up: Some(me), processes: Vec::new() };
        home.write_state(&state).unwrap();
        assert_eq!(home.state().unwrap(), state);
        std::fs::create_dir(home.data().join("region1")).unwrap();
        for _ in 0..2 {
            home.clear(&lock).unwrap();
            assert!(!home.data().join("region1").exists());
        }
        assert!(home.data().join("old-0/region1").is_dir());
        home.delete_old(&lock).unwrap();
        assert_eq!(std::fs::read_dir(home.data()).unwrap().count(), 0);
        drop(lock);
        assert!(home.lock().unwrap().is_some());
    }

    #[test]
    fn data_that_servers_cannot_reach_lies_elsewhere() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let home = Home::open(&dir.path().join(".tier0")).unwrap();
        assert!(home.is_elsewhere());
        assert!(reachable(home.data()));
        assert_eq!(
            Home::open(&dir.path().join(".tier0")).unwrap().data(),
            home.data(),
            "the same place again"
        );
        let mode = std::fs::metadata(dir.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "the home stays closed");
        std::fs::remove_dir_all(home.data()).unwrap();
    }
}
