//! A connection pooler in front of Postgres, as many sites have one.
//!
//! Runs as user `postgres` when we are root. Knows the roles that the test names, and lets them into every database.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;
use tokio::net::TcpStream;

use crate::account::{Account, private_dir, private_file};
use crate::child::{Child, Start};
use crate::port::Port;
use crate::postgres::{Postgres, Role};
use crate::scratch::Scratch;
use crate::shipped;

const READY: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(5);

/// A running pooler.
#[derive(Debug)]
pub struct Pgbouncer {
    port: Port,
    child: Child,
}

impl Pgbouncer {
    /// A pooler for `postgres` on a free port; `extra` are lines of its configuration, `pool_mode = session` for instance.
    ///
    /// # Errors
    /// When it is not installed or does not come up.
    pub async fn start(scratch: &Scratch, postgres: &Postgres, extra: &[&str]) -> anyhow::Result<Self> {
        let account = Account::of_server("postgres")?;
        let port = Port::free()?;
        let dir: PathBuf = scratch.path().join(format!("pgbouncer-{}", port.number()));
        private_dir(&dir, account.as_ref())?;
        let users: String = [Role::Owner, Role::Writer]
            .map(|role| format!("\"{}\" \"{}\"\n", role.name(), postgres.passwords().of(role)))
            .concat();
        private_file(&dir.join("users.txt"), &users, account.as_ref())?;
        let configuration = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {}\n\
             unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n{}\n",
            postgres.port(),
            port.number(),
            dir.join("users.txt").display(),
            extra.join("\n"),
        );
        private_file(&dir.join("pgbouncer.ini"), &configuration, account.as_ref())?;
        let log = dir.with_extension("log");
        let start = Start::new("pgbouncer", shipped::server("pgbouncer")?, &log)
            .args([dir.join("pgbouncer.ini")])
            .account(account);
        let mut child = start.spawn().await?;
        let number = port.number();
        child
            .until("accepts a client", READY, || async move {
                TcpStream::connect(("127.0.0.1", number)).await.context("connect")
            })
            .await?;
        Ok(Self { port, child })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }
}

impl Drop for Pgbouncer {
    fn drop(&mut self) {
        self.child.stop_blocking(Signal::SIGINT, STOP);
    }
}
