//! A memory limit for a child, as a container has it: a control group of its own, below ours.
//!
//! Both generations of the kernel's interface: version 2 where it has the memory controller, else version 1. The group is
//! made beside or below the one we are in, so that whatever limits us limits it too.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

const ROOT: &str = "/sys/fs/cgroup";

/// A group with a memory limit. Dropping it removes it; what ran in it must have ended.
#[derive(Debug)]
pub struct MemoryLimit {
    path: PathBuf,
    files: Files,
}

/// What the two generations call the same things.
#[derive(Debug, Clone, Copy)]
struct Files {
    max: &'static str,
    peak: &'static str,
    /// Has a line `oom_kill N`.
    events: &'static str,
    /// Memory and swap together, or swap alone; `None` when the limit holds without it.
    swap: Option<(&'static str, bool)>,
}

const V2: Files = Files {
    max: "memory.max",
    peak: "memory.peak",
    events: "memory.events",
    swap: Some(("memory.swap.max", false)),
};
const V1: Files = Files {
    max: "memory.limit_in_bytes",
    peak: "memory.max_usage_in_bytes",
    events: "memory.oom_control",
    swap: Some(("memory.memsw.limit_in_bytes", true)),
};

impl MemoryLimit {
    /// A new group; `name` must be no other's.
    ///
    /// # Errors
    /// When we may make none: this takes root, and a kernel with the memory controller.
    pub fn new(name: &str, max_bytes: u64) -> anyhow::Result<Self> {
        let ours = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
        let (parent, files) = place(&ours, Path::new(ROOT))?;
        let path = parent.join(format!("tier0-{name}-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("make the control group {}", path.display()))?;
        let group = Self { path, files };
        group.write(files.max, &max_bytes.to_string())?;
        if let Some((file, together)) = files.swap {
            let value = if together { max_bytes } else { 0 };
            // A kernel without accounting of swap has no such file.
            if group.path.join(file).exists() {
                group.write(file, &value.to_string())?;
            }
        }
        Ok(group)
    }

    /// Puts a process in; what it has used so far stays with the group it came from.
    ///
    /// # Errors
    /// When it has ended.
    pub fn add(&self, pid: i32) -> anyhow::Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// The most that was in use at once, in bytes. Counts the pages of files it read, which the kernel gives up before it kills.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn peak(&self) -> anyhow::Result<u64> {
        Ok(self.read(self.files.peak)?.trim().parse()?)
    }

    /// Processes that the kernel killed for their memory.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn kills(&self) -> anyhow::Result<u64> {
        let events = self.read(self.files.events)?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.with_context(|| format!("no oom_kill in {events}"))?.trim().parse()?)
    }

    fn read(&self, file: &str) -> anyhow::Result<String> {
        let path = self.path.join(file);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    fn write(&self, file: &str, value: &str) -> anyhow::Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        match fs::remove_dir(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, path = %self.path.display(), "control group not removed"),
        }
    }
}

/// Where a group may be made, out of `/proc/self/cgroup`: lines of `ID:CONTROLLERS:PATH`, the unified one with ID 0.
fn place(ours: &str, root: &Path) -> anyhow::Result<(PathBuf, Files)> {
    let line = |wanted: fn(&str, &str) -> bool| {
        ours.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            wanted(id, controllers).then(|| path.trim_start_matches('/').to_owned())
        })
    };
    if let Some(path) = line(|_, controllers| controllers.split(',').any(|name| name == "memory")) {
        return Ok((root.join("memory").join(path), V1));
    }
    if let Some(path) = line(|id, _| id == "0") {
        // A group with processes of its own may not pass controllers on, so the new one goes beside ours.
        let ours = root.join(path);
        let parent = if ours == root { ours } else { ours.parent().unwrap_or(root).to_owned() };
        let passed_on = parent.join("cgroup.subtree_control");
        let controllers = fs::read_to_string(&passed_on).unwrap_or_default();
        if controllers.split_whitespace().any(|name| name == "memory") {
            return Ok((parent, V2));
        }
        bail!("{} does not name the memory controller", passed_on.display());
    }
    bail!("no control group can be made here: /proc/self/cgroup is {ours:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_generation_is_used_where_it_has_the_controller() {
        let (path, files) = place("5:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n", Path::new(ROOT)).unwrap();
        assert_eq!(path, Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(files.max, "memory.limit_in_bytes");
    }

    #[test]
    fn the_second_generation_needs_a_parent_that_passes_it_on() {
        let root = tempfile::tempdir().unwrap();
        let slice = root.path().join("slice");
        fs::create_dir_all(slice.join("session")).unwrap();
        assert!(place("0::/slice/session\n", root.path()).is_err());
        fs::write(slice.join("cgroup.subtree_control"), "cpu memory\n").unwrap();
        let (path, files) = place("0::/slice/session\n", root.path()).unwrap();
        assert_eq!((path, files.max), (slice, "memory.max"));
    }

    #[test]
    fn what_a_child_uses_is_seen_and_the_group_goes_with_it() {
        let limit = MemoryLimit::new("test", 64 << 20).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        limit.add(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(limit.peak().unwrap() < 64 << 20);
        assert_eq!(limit.kills().unwrap(), 0);
        child.kill().unwrap();
        child.wait().unwrap();
        let path = limit.path.clone();
        drop(limit);
        assert!(!path.exists());
    }
}
