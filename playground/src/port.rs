//! Ports for servers that cannot take port 0 and must come back on the same one after a restart.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

/// Below the range the kernel hands out for outgoing connections (32768 and up), so that no client's socket sits on
/// the port of a server that is being restarted.
const FIRST: u16 = 20_000;
const LAST: u16 = 31_999;

/// A port on 127.0.0.1 that no other playground of this user takes while the value lives, server up or down.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _claim: Flock<File>,
}

impl Port {
    #[must_use]
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Any free port.
    ///
    /// # Errors
    /// When none is free.
    pub fn free() -> anyhow::Result<Self> {
        let span = u32::from(LAST - FIRST) + 1;
        // Start somewhere else in each process, so that processes started together do not try the same ports.
        let start = std::process::id().wrapping_mul(2_654_435_761) % span;
        for offset in 0..span {
            let number = FIRST + u16::try_from((start + offset) % span).unwrap_or(0);
            if let Some(port) = Self::claim(number)? {
                return Ok(port);
            }
        }
        bail!("no free port between {FIRST} and {LAST}")
    }

    /// The given port, or `None` when somebody listens on it or another playground claims it.
    ///
    /// # Errors
    /// When the directory of claims cannot be used.
    pub fn claim(number: u16) -> anyhow::Result<Option<Self>> {
        let path = claims()?.join(number.to_string());
        let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
        let Ok(claim) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
        if TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_err() {
            return Ok(None);
        }
        Ok(Some(Self { number, _claim: claim }))
    }

    /// The wanted port, else the next free one above it.
    ///
    /// # Errors
    /// When no port is free.
    pub fn near(wanted: u16) -> anyhow::Result<Self> {
        for number in wanted..=wanted.saturating_add(200) {
            if let Some(port) = Self::claim(number)? {
                return Ok(port);
            }
        }
        Self::free()
    }
}

fn claims() -> anyhow::Result<PathBuf> {
    let directory = std::env::temp_dir().join(format!("tier0-ports-{}", geteuid()));
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("protect {}: does it belong to somebody else?", directory.display()))?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_claimed_once() {
        let port = Port::free().unwrap();
        assert!(Port::claim(port.number()).unwrap().is_none(), "claimed, though nobody listens");
        assert_ne!(Port::near(port.number()).unwrap().number(), port.number());
        let number = port.number();
        drop(port);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).unwrap();
        assert!(Port::claim(number).unwrap().is_none(), "somebody listens");
        drop(listener);
        assert!(Port::claim(number).unwrap().is_some());
    }
}
