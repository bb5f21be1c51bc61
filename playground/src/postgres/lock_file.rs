//! Postgres' own lock file, read to know whether a dead postmaster left something behind.

use std::path::Path;

/// What `postmaster.pid` says: the process, and its segment of System V shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LockFile {
    pub(super) pid: i32,
    pub(super) shared_memory: Option<i32>,
}

impl LockFile {
    pub(super) fn read(path: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(path).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let pid = text.lines().next()?.trim().parse().ok()?;
        // The seventh line is "key id".
        let shared_memory =
            text.lines().nth(6).and_then(|line| line.split_ascii_whitespace().nth(1)?.parse().ok());
        Some(Self { pid, shared_memory })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_lock_file() {
        let text = "15322\n/data/region2\n1795260500\n5435\n\n127.0.0.1\n   920382     65536\nready   \n";
        assert_eq!(LockFile::parse(text), Some(LockFile { pid: 15322, shared_memory: Some(65536) }));
        assert_eq!(LockFile::parse("15322\n"), Some(LockFile { pid: 15322, shared_memory: None }));
        assert_eq!(LockFile::parse(""), None);
    }
}
