//! The processes of one Postgres, found by their name and their working directory, which is the data directory.
//!
//! A postmaster that was killed leaves its children behind for a moment; nothing may touch the data before they are gone.

use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

/// Everything that runs in `data`. Needs to be root or the same user.
#[must_use]
pub fn inside(data: &Path) -> Vec<i32> {
    let Ok(data) = data.canonicalize() else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data))
        // Somebody's shell may be there too; it is not ours to end.
        .filter(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.starts_with("postgres"))
        })
        .collect()
}

/// Kills what a dead postmaster left, and returns when it is gone.
///
/// # Errors
/// When something is still there after 10 s.
pub async fn sweep(data: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let left = inside(data);
        let Some(first) = left.first() else { return Ok(()) };
        if Instant::now() > deadline {
            bail!("process {first} still works in {} 10 s after SIGKILL", data.display());
        }
        for pid in &left {
            // Gone in between is what we want.
            if let Err(error) = kill(Pid::from_raw(*pid), Signal::SIGKILL) {
                tracing::debug!(pid, %error, "not killed");
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
