//! The scheduler's priorities: whoever decides about a failover comes first, whoever is dying comes last.
//!
//! A region's loss makes its machine and its neighbours busy, in the very moment in which the agent has to promote. On
//! two cores the teardown of a killed Postgres, which frees its shared memory, took as long as the promotion beside it.
//! Only a matter of speed: where the account may not raise its priority it stays as it is.

use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::process::{getpriority_process, setpriority_process};

/// Ahead of everything that has not asked for more; kernel threads keep their own.
const FIRST: i32 = -10;
const ORDINARY: i32 = 0;
const LAST: i32 = 19;

/// Puts the calling thread first, and every thread it starts from now on.
///
/// # Errors
/// When the account may not (it needs `CAP_SYS_NICE` or a limit on `nice`).
pub fn first() -> Result<(), Errno> {
    setpriority_process(None, FIRST)
}

/// Undoes [`first`] for the calling thread and what it starts: Postgres is no more urgent than other work.
pub(crate) fn ordinary() {
    if getpriority_process(None).is_ok_and(|priority| priority < ORDINARY)
        && let Err(error) = setpriority_process(None, ORDINARY)
    {
        tracing::debug!(%error, "children inherit the agent's priority");
    }
}

/// Puts another process first. For the one that replays: what it is behind is added to a failover, and it alone carries
/// out the promotion.
pub(crate) fn first_of(pid: Pid) {
    set(pid, FIRST);
}

/// Puts another process last. For one that ends anyhow.
pub(crate) fn last(pid: Pid) {
    set(pid, LAST);
}

fn set(pid: Pid, priority: i32) {
    if let Some(process) = rustix::process::Pid::from_raw(pid.as_raw())
        && let Err(error) = setpriority_process(Some(process), priority)
    {
        tracing::debug!(%pid, priority, %error, "a process keeps its priority");
    }
}

/// To be logged when logs are up.
pub fn log(raised: Result<(), Errno>) {
    if let Err(error) = raised {
        tracing::info!(%error, "running at ordinary priority; with CAP_SYS_NICE a busy machine would delay a failover less");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_is_put_last_is_last_and_children_do_not_inherit_the_first_place() {
        std::thread::spawn(|| {
            let raised = first();
            let expected = if raised.is_ok() { FIRST } else { getpriority_process(None).unwrap() };
            assert_eq!(getpriority_process(None).unwrap(), expected);
            ordinary();
            assert!(getpriority_process(None).unwrap() >= ORDINARY);
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            let pid = i32::try_from(child.id()).unwrap();
            let of = || getpriority_process(rustix::process::Pid::from_raw(pid)).unwrap();
            last(Pid::from_raw(pid));
            assert_eq!(of(), LAST);
            first_of(Pid::from_raw(pid));
            assert_eq!(of(), if raised.is_ok() { FIRST } else { LAST });
            child.kill().unwrap();
            child.wait().unwrap();
        })
        .join()
        .unwrap();
    }
}
