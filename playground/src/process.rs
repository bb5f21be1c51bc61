//! A running process, written down so that another program knows it again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::procfs;

/// One process and how to know it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub name: String,
    pub pid: i32,
    /// Start time in ticks after boot: a pid alone may be somebody else's by now.
    pub started: u64,
    pub port: u16,
    pub log: PathBuf,
}

impl Process {
    #[must_use]
    pub fn new(name: &str, pid: i32, port: u16, log: &Path) -> Self {
        let started = procfs::stat(pid).map_or(0, |stat| stat.started);
        Self { name: name.to_owned(), pid, started, port, log: log.to_owned() }
    }

    #[must_use]
    pub fn lives(&self) -> bool {
        procfs::lives(self.pid) && procfs::stat(self.pid).is_some_and(|stat| stat.started == self.started)
    }
}
