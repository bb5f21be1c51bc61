//! A wall clock that a test sets, for processes that it starts: libfaketime, told by a file how far to be off.
//!
//! The monotonic clock stays as it is, so that timeouts and pauses of the process are real.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::procfs;

/// The clock of the processes that are started with its environment. Right at first.
#[derive(Debug)]
pub struct FakeClock {
    file: PathBuf,
    library: PathBuf,
}

impl FakeClock {
    /// `dir` must be readable by the account that the processes run as.
    ///
    /// # Errors
    /// When libfaketime is not installed.
    pub fn new(dir: &Path, name: &str) -> anyhow::Result<Self> {
        remove_left_behind();
        let clock = Self { file: dir.join(format!("{name}.clock")), library: library()? };
        clock.set("+0")?;
        Ok(clock)
    }

    /// Off by this much from now on: `+30h`, `-90`, `+0`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set(&self, offset: &str) -> anyhow::Result<()> {
        // Replaced as a whole: the processes read it at any moment.
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{offset}\n")).with_context(|| format!("write {}", new.display()))?;
        std::fs::rename(&new, &self.file).with_context(|| format!("replace {}", self.file.display()))
    }

    /// For the processes whose clock it is.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        [
            ("LD_PRELOAD", text(&self.library)),
            ("FAKETIME_TIMESTAMP_FILE", text(&self.file)),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("NO_FAKE_STAT", "1".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}

/// The library leaves shared memory, named after its process, when that is killed; a later process of that number and of
/// another account could not start.
fn remove_left_behind() {
    let Ok(entries) = std::fs::read_dir("/dev/shm") else { return };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("sem.faketime_sem_").or_else(|| name.strip_prefix("faketime_shm_"));
        if pid.and_then(|pid| pid.parse().ok()).is_some_and(|pid: i32| !procfs::lives(pid)) {
            drop(std::fs::remove_file(entry.path()));
        }
    }
}

/// Debian has it in a directory named after the machine's architecture.
fn library() -> anyhow::Result<PathBuf> {
    let directories = std::fs::read_dir("/usr/lib").context("read /usr/lib")?;
    let found = directories
        .filter_map(Result::ok)
        .map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"))
        .find(|path| path.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!("libfaketime is not installed: playground/install.sh test"),
    }
}
