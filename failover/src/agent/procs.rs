//! The processes of one Postgres, found by their name and their working directory, which is the data directory.
//!
//! A postmaster that was killed leaves its children behind for a moment; nothing may touch the data before they are gone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

use crate::agent::shared::Shared;
use crate::priority;
use crate::protocol::Postmaster;

const LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);

/// Everything that runs in `data`. Needs to be root or the same user.
#[must_use]
pub fn inside(data: &Path) -> Vec<i32> {
    let Ok(data) = data.canonicalize() else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| works_in(*pid, &data))
        .collect()
}

fn works_in(pid: i32, data: &Path) -> bool {
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data)
        // Somebody's shell may be there too; it is not ours to end.
        && std::fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| name.starts_with("postgres") || name.starts_with("postmaster"))
}

/// The living postmaster of `data`, by its lock file.
#[must_use]
pub fn postmaster(data: &Path) -> Option<Pid> {
    let text = std::fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let pid = text.lines().next()?.trim().parse::<i32>().ok()?;
    let living = works_in(pid, &data.canonicalize().ok()?) && !is_exiting(Pid::from_raw(pid));
    living.then(|| Pid::from_raw(pid))
}

/// Whether a process will never run a line of its own again: the kernel is taking it apart, or has done so and its parent
/// has not asked.
#[must_use]
pub fn is_exiting(pid: Pid) -> bool {
    /// `PF_EXITING` of the flags in `/proc/PID/stat`.
    const EXITING: u32 = 0x4;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands in parentheses and may hold anything.
    let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split_ascii_whitespace().nth(6));
    flags.and_then(|flags| flags.parse::<u32>().ok()).is_some_and(|flags| flags & EXITING != 0)
}

/// Ends when the kernel takes a postmaster apart that nobody asked to stop. Its sessions learn of that first, by a pipe that
/// is closed on the way; its parent last, and a dozen sessions that end at once, each with its share of the memory to
/// free, come in between: 27 to 50 ms on two busy cores.
pub(super) async fn dies(pid: Option<Pid>, shared: &Shared) {
    loop {
        shared.session_ended.notified().await;
        if shared.status().postmaster != Postmaster::Stopping && pid.is_some_and(is_exiting) {
            return;
        }
    }
}

/// Kills what a dead postmaster left, and returns when it is gone. What is dying gives way to everything else: freeing
/// its shared memory costs processor time just when the other region takes over.
///
/// # Errors
/// When something is still there after 10 s.
pub async fn sweep(data: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    let data: PathBuf = data.canonicalize().unwrap_or_else(|_| data.into());
    loop {
        // Looking at every process of the machine takes milliseconds; after that, only at these.
        let mut left = inside(&data);
        if left.is_empty() {
            return forget_dead(&data);
        }
        for pid in left.iter().map(|pid| Pid::from_raw(*pid)) {
            priority::last(pid);
            // Gone in between is what we want.
            if let Err(error) = kill(pid, Signal::SIGKILL) {
                tracing::debug!(%pid, %error, "not killed");
            }
        }
        loop {
            left.retain(|pid| works_in(*pid, &data));
            let Some(first) = left.first() else { break };
            if Instant::now() > deadline {
                bail!("process {first} still works in {} {LIMIT:?} after SIGKILL", data.display());
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Removes the lock file of a postmaster that is gone. Postgres and `pg_rewind` take every process of their account that has
/// its number for a living postmaster: one that nobody has reaped yet, and after a restart of the machine whoever was given
/// the number since. Nobody starts it then, and a rewind that fails would end in a clone.
///
/// # Errors
/// When it cannot be removed.
pub fn forget_dead(data: &Path) -> anyhow::Result<()> {
    let path = data.join("postmaster.pid");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
    let named = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok());
    // One that has just been written names nobody yet.
    let Some(pid) = named else { return Ok(()) };
    if postmaster(data).is_some() {
        return Ok(());
    }
    tracing::info!(pid, "the lock file of a postmaster that is gone was removed");
    std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    #[test]
    fn only_a_living_postmaster_of_this_data_keeps_its_lock_file() {
        let data = tempfile::tempdir().unwrap();
        let lock = data.path().join("postmaster.pid");
        let kept = |pid: &dyn std::fmt::Display| {
            std::fs::write(&lock, format!("{pid}\n/somewhere\n")).unwrap();
            forget_dead(data.path()).unwrap();
            lock.exists()
        };
        // The number was given to somebody else.
        assert!(!kept(&std::process::id()));
        assert!(kept(&""), "it is being written");
        // A program that is called postgres and works there, as a postmaster does.
        let program = data.path().join("postgres");
        std::fs::copy("/bin/sleep", &program).unwrap();
        let mut child =
            std::process::Command::new(&program).arg("600").current_dir(data.path()).spawn().unwrap();
        let pid = child.id();
        let deadline = std::time::Instant::now() + SOON;
        while inside(data.path()).is_empty() {
            assert!(std::time::Instant::now() < deadline, "not seen");
        }
        assert!(kept(&pid));
        child.kill().unwrap();
        while !is_exiting(Pid::from_raw(pid.cast_signed())) {
            assert!(std::time::Instant::now() < deadline, "killed, and it goes on");
        }
        assert!(!kept(&pid), "nobody has reaped it");
        child.wait().unwrap();
        assert!(!kept(&pid), "gone");
    }

    #[test]
    fn a_killed_process_is_exiting_until_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        assert!(!is_exiting(pid));
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + SOON;
        while !is_exiting(pid) {
            assert!(std::time::Instant::now() < deadline, "killed, and it goes on");
        }
        child.wait().unwrap();
        assert!(!is_exiting(pid), "gone");
    }

    #[tokio::test]
    async fn a_session_that_ends_shows_whether_the_postmaster_dies() {
        let shared = Shared::new("a", 1, 0);
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).ok().map(Pid::from_raw);
        shared.postmaster(Postmaster::Running, None);
        let soon = Duration::from_millis(100);
        shared.session_ended.notify_one();
        assert!(tokio::time::timeout(soon, dies(pid, &shared)).await.is_err(), "it lives");
        child.kill().unwrap();
        let deadline = Instant::now() + SOON;
        while !is_exiting(pid.unwrap()) {
            assert!(Instant::now() < deadline, "killed, and it goes on");
        }
        shared.postmaster(Postmaster::Stopping, None);
        shared.session_ended.notify_one();
        assert!(tokio::time::timeout(soon, dies(pid, &shared)).await.is_err(), "it was asked to");
        shared.postmaster(Postmaster::Running, None);
        shared.session_ended.notify_one();
        let known = tokio::time::timeout(SOON, dies(pid, &shared)).await;
        child.wait().unwrap();
        known.unwrap();
    }
}
