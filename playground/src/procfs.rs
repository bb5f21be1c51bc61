//! What the kernel says of a process: parent, state, processor time, memory. Reads `/proc`, changes nothing.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

/// Clock ticks a second in `/proc/PID/stat`. Fixed at 100 for user space on every Linux we run on.
const TICKS_PER_SECOND: f64 = 100.0;
const PAGE_BYTES: u64 = 4096;

/// One line of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stat {
    pub parent: i32,
    /// `R`, `S`, `T` (stopped), `Z` (dead, not yet reaped) and so on.
    pub state: char,
    /// User and system time so far, that of children which have ended included.
    pub cpu_seconds: f64,
    pub rss_bytes: u64,
    /// Ticks after boot. Together with the pid it names a process for good: pids are used again.
    pub started: u64,
}

/// `None` when there is no such process.
#[must_use]
pub fn stat(pid: i32) -> Option<Stat> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(line: &str) -> Option<Stat> {
    // The command name stands in parentheses and may hold blanks and parentheses itself.
    let rest = line.rsplit_once(") ")?.1;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    #[allow(clippy::cast_precision_loss, reason = "ticks of a process' life fit a double")]
    let cpu_seconds = (number(11)? + number(12)? + number(13)? + number(14)?) as f64 / TICKS_PER_SECOND;
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        cpu_seconds,
        started: number(19)?,
        rss_bytes: number(21)? * PAGE_BYTES,
    })
}

/// Whether the process runs or is stopped; a zombie does not.
#[must_use]
pub fn lives(pid: i32) -> bool {
    stat(pid).is_some_and(|stat| stat.state != 'Z' && stat.state != 'X')
}

/// All processes of the machine at one moment: one walk through `/proc`, which may be long.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    stats: HashMap<i32, Stat>,
    children: HashMap<i32, Vec<i32>>,
}

impl Snapshot {
    #[must_use]
    pub fn take() -> Self {
        let mut snapshot = Self::default();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
            if let Some((pid, stat)) = pid.and_then(|pid| Some((pid, stat(pid)?))) {
                snapshot.children.entry(stat.parent).or_default().push(pid);
                snapshot.stats.insert(pid, stat);
            }
        }
        snapshot
    }

    /// All processes below this one, parents before children. Postgres' backends are sessions of their own, so a
    /// process group does not find them; the tree does, as long as its root lives.
    #[must_use]
    pub fn descendants(&self, root: i32) -> Vec<i32> {
        self.descendants_but(root, &[])
    }

    fn descendants_but(&self, root: i32, others: &[i32]) -> Vec<i32> {
        let mut found = Vec::new();
        let mut next = vec![root];
        while let Some(pid) = next.pop() {
            for child in self.children.get(&pid).into_iter().flatten().filter(|child| !others.contains(child))
            {
                found.push(*child);
                next.push(*child);
            }
        }
        found
    }

    /// Processor time of a process and all below it, in seconds. 0 when it is gone.
    #[must_use]
    pub fn tree_cpu_seconds(&self, root: i32) -> f64 {
        self.tree_cpu_seconds_but(root, &[])
    }

    /// The same without `others` and all below them: they are accounted for themselves.
    #[must_use]
    pub fn tree_cpu_seconds_but(&self, root: i32, others: &[i32]) -> f64 {
        let tree = std::iter::once(root).chain(self.descendants_but(root, others));
        tree.filter_map(|pid| self.stats.get(&pid)).map(|stat| stat.cpu_seconds).sum()
    }
}

/// As [`Snapshot::tree_cpu_seconds`], now.
#[must_use]
pub fn tree_cpu_seconds(root: i32) -> f64 {
    Snapshot::take().tree_cpu_seconds(root)
}

/// As [`Snapshot::descendants`], now.
#[must_use]
pub fn descendants(root: i32) -> Vec<i32> {
    Snapshot::take().descendants(root)
}

/// The most memory the process ever had. 0 when it is gone.
#[must_use]
pub fn peak_rss_bytes(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Files below `prefix` that the process has mapped into its memory.
#[must_use]
pub fn mapped(pid: i32, prefix: &str) -> BTreeSet<PathBuf> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.find(prefix).and_then(|at| line.get(at..)));
    paths.map(|path| PathBuf::from(path.trim_end_matches(" (deleted)"))).collect()
}

/// Processes attached to a segment of System V shared memory. 0 when there is no such segment.
#[must_use]
pub fn attached(segment: i32) -> u32 {
    let table = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    // key shmid perms size cpid lpid nattch ..
    let rows = table.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let mut rows = rows.filter(|row| row.get(1).is_some_and(|id| id.parse() == Ok(segment)));
    rows.find_map(|row| row.get(6)?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line_with_blanks_and_parentheses_in_the_name() {
        let line = "4711 (post (gres) x) T 1 4711 4711 0 -1 4194560 900 0 0 0 150 50 7 7 20 0 1 0 123456 99 2 18446744073709551615 1";
        let stat = parse(line).unwrap();
        assert_eq!((stat.parent, stat.state, stat.started, stat.rss_bytes), (1, 'T', 123_456, 8192));
        assert!((stat.cpu_seconds - 2.14).abs() < 1e-9);
    }

    #[test]
    fn a_tree_leaves_out_what_is_accounted_for_itself() {
        let mut snapshot = Snapshot::default();
        for (pid, parent, cpu_seconds) in [(1, 0, 1.0), (2, 1, 2.0), (3, 2, 4.0), (4, 1, 8.0)] {
            let stat = Stat { parent, state: 'S', cpu_seconds, rss_bytes: 0, started: 0 };
            snapshot.children.entry(parent).or_default().push(pid);
            snapshot.stats.insert(pid, stat);
        }
        let sums = [snapshot.tree_cpu_seconds(1), snapshot.tree_cpu_seconds_but(1, &[1, 2])];
        assert_eq!(sums, [15.0, 9.0]);
    }

    #[test]
    fn finds_this_process() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(lives(me));
        assert!(peak_rss_bytes(me) > 1 << 20);
        assert!(descendants(stat(me).unwrap().parent).contains(&me));
        assert!(!lives(i32::MAX));
    }
}
