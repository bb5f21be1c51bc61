//! One Postgres node: its data directory, its port, its process.
//!
//! Runs as user `postgres` when we are root. Listens on 127.0.0.1 only, with SCRAM passwords. Durability is never
//! switched off: fsync and full page writes stay on, in tests too. How nodes form a primary with standbys is
//! [`crate::cluster`].

mod connection;
mod lock_file;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use tokio_postgres::Config;

use crate::account::{Account, private_file};
use crate::child::{Child, POLL, Reach, Start};
use crate::port::Port;
use crate::{procfs, shipped};
pub use connection::{Db, Passwords, Role, connect};
pub(crate) use connection::{config, connect_within, random_word};
use lock_file::LockFile;

pub const DATABASE: &str = "tier0_db";
/// Crash recovery of a big log takes this long on a slow disk.
const READY: Duration = Duration::from_secs(120);
/// A fast shutdown writes a checkpoint.
const STOP: Duration = Duration::from_secs(60);
/// For a session with a server that is there, on a busy machine.
const SESSION: Duration = Duration::from_secs(30);
/// Before anybody can write, a promotion copies the segment it stops in, and makes the next when that one is nearly full: a
/// quarter of what the default of 16 MB costs. Also in config/postgres/start-node.sh.
const WAL_SEGMENTS: &str = "--wal-segsize=4";

/// An immediate shutdown, from a destructor.
const QUIT: Duration = Duration::from_secs(3);
/// Where a postmaster and its backends share memory.
const SHARED_MEMORY: &str = "/dev/shm/PostgreSQL.";

/// One node, running or not.
#[derive(Debug)]
pub struct Postgres {
    name: String,
    data: PathBuf,
    log: PathBuf,
    port: Port,
    account: Option<Account>,
    passwords: Passwords,
    child: Option<Child>,
    /// Shared memory of a postmaster that was killed. Its next start on the same data frees it; without one, we do.
    orphaned: BTreeSet<PathBuf>,
    environment: Vec<(String, String)>,
}

impl Postgres {
    /// A node with its data in `dir/NAME` and its log in `dir/NAME.log`; nothing is started.
    ///
    /// # Errors
    /// When user `postgres` is missing.
    pub fn new(name: &str, dir: &Path, port: Port, passwords: Passwords) -> anyhow::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            data: dir.join(name),
            log: dir.join(format!("{name}.log")),
            port,
            account: Account::of_server("postgres")?,
            passwords,
            child: None,
            orphaned: BTreeSet::new(),
            environment: Vec::new(),
        })
    }

    /// Creates the data directory.
    ///
    /// # Errors
    /// When `initdb` fails.
    pub async fn init(&self, sync: bool) -> anyhow::Result<()> {
        self.make_parent()?;
        let password = self.data.with_extension("initial-password");
        private_file(&password, self.passwords.of(Role::Admin), self.account.as_ref())?;
        let mut args = vec![
            format!("--pgdata={}", self.data.display()),
            format!("--username={}", Role::Admin.name()),
            format!("--pwfile={}", password.display()),
            "--auth=scram-sha-256".into(),
            "--encoding=UTF8".into(),
            "--locale=C.UTF-8".into(),
            "--data-checksums".into(),
            WAL_SEGMENTS.into(),
        ];
        if !sync {
            args.push("--no-sync".into());
        }
        let result = self.tool("initdb", args).await;
        std::fs::remove_file(&password).with_context(|| format!("remove {}", password.display()))?;
        result
    }

    /// Clones `primary` into this node's data directory through a physical slot named as this node, and makes it a
    /// standby of that primary.
    ///
    /// # Errors
    /// When `pg_basebackup` fails.
    pub async fn clone_from(&self, primary: &Self, sync: bool) -> anyhow::Result<()> {
        self.make_parent()?;
        let passfile = self.passfile();
        private_file(
            &passfile,
            &format!("*:*:*:{}:{}\n", Role::Replicator.name(), self.passwords.of(Role::Replicator)),
            self.account.as_ref(),
        )?;
        let mut args = vec![
            format!("--pgdata={}", self.data.display()),
            format!(
                "--dbname=host=127.0.0.1 port={} user={} passfile={}",
                primary.port(),
                Role::Replicator.name(),
                passfile.display()
            ),
            "--wal-method=stream".into(),
            "--create-slot".into(),
            format!("--slot={}", self.name),
            "--checkpoint=fast".into(),
        ];
        if !sync {
            args.push("--no-sync".into());
        }
        self.tool("pg_basebackup", args).await?;
        self.follow(primary)
    }

    /// Makes this node a standby of `primary` from its next start on.
    ///
    /// # Errors
    /// When the data directory cannot be written.
    pub fn follow(&self, primary: &Self) -> anyhow::Result<()> {
        let passfile = self.passfile();
        private_file(
            &passfile,
            &format!("*:*:*:{}:{}\n", Role::Replicator.name(), self.passwords.of(Role::Replicator)),
            self.account.as_ref(),
        )?;
        let auto = format!(
            "primary_conninfo = 'host=127.0.0.1 port={} user={} passfile=''{}'' application_name={} connect_timeout=3 \
             keepalives_idle=5 keepalives_interval=1 keepalives_count=3'\nprimary_slot_name = '{}'\n",
            primary.port(),
            Role::Replicator.name(),
            passfile.display(),
            self.name,
            self.name,
        );
        private_file(&self.data.join("postgresql.auto.conf"), &auto, self.account.as_ref())?;
        private_file(&self.data.join("standby.signal"), "", self.account.as_ref())
    }

    /// Writes the node's configuration: `config/postgres/postgresql.conf`, then what is the node's own, then `extra`.
    ///
    /// # Errors
    /// When the data directory cannot be written.
    pub fn configure(&self, extra: &[(String, String)]) -> anyhow::Result<()> {
        let mut text = shipped::config("postgres/postgresql.conf")?;
        text.push_str("\n# --- this node, written at each start by the playground ---\n");
        let own = [
            ("listen_addresses", "127.0.0.1".to_owned()),
            ("port", self.port().to_string()),
            ("cluster_name", self.name.clone()),
        ];
        let own = own.iter().map(|(key, value)| (*key, value.as_str()));
        for (key, value) in own.chain(extra.iter().map(|(key, value)| (key.as_str(), value.as_str()))) {
            text.push_str(&format!("{key} = '{}'\n", value.replace('\'', "''")));
        }
        private_file(&self.data.join("postgresql.conf"), &text, self.account.as_ref())?;
        private_file(
            &self.data.join("pg_hba.conf"),
            &shipped::config("postgres/pg_hba.conf")?,
            self.account.as_ref(),
        )
    }

    /// Environment variables of the server from its next start on, for instance those of a
    /// [`FakeClock`](crate::faketime::FakeClock).
    pub fn set_environment(&mut self, environment: Vec<(String, String)>) {
        self.environment = environment;
    }

    /// Starts the server and waits until it answers a query.
    ///
    /// # Errors
    /// When it does not come up; the message holds the end of its log.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            return Ok(());
        }
        self.clear_dead_postmaster().await?;
        let program = shipped::postgres_bin()?.join("postgres");
        let start = if self.environment.is_empty() {
            Start::new(&self.name, program, &self.log)
        } else {
            // Set by env(1), which runs as the server's own account already: what the variables load must not run as ours.
            Start::new(&self.name, "/usr/bin/env", &self.log)
                .args(self.environment.iter().map(|(name, value)| format!("{name}={value}")))
                .args([program])
        };
        let start =
            start.args([std::ffi::OsStr::new("-D"), self.data.as_os_str()]).account(self.account.clone());
        let child = self.child.insert(start.spawn().await?);
        let config = config(self.port.number(), &self.passwords, Role::Admin, "postgres");
        child
            .until("answers a query", READY, || async {
                let db = connect(&config).await?;
                db.simple_query("SELECT 1").await.context("SELECT 1")?;
                anyhow::Ok(())
            })
            .await?;
        self.orphaned.clear();
        Ok(())
    }

    /// Fast shutdown: open transactions are rolled back, a checkpoint is written, an attached standby gets everything.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let status = child.stop(Signal::SIGINT, STOP).await?;
        if !status.success() {
            bail!("{} ended with {status}{}", self.name, child.tail());
        }
        Ok(())
    }

    /// SIGKILL; returns when all its processes are gone.
    ///
    /// # Errors
    /// When one of them stays.
    pub async fn kill9(&mut self, reach: Reach) -> anyhow::Result<()> {
        match self.child.take() {
            Some(mut child) => {
                self.orphaned.extend(procfs::mapped(child.pid(), SHARED_MEMORY));
                child.kill9(reach).await
            }
            None => Ok(()),
        }
    }

    /// Stops it if it runs (fast), then starts it on the same port and data.
    ///
    /// # Errors
    /// As [`Postgres::stop`] and [`Postgres::start`].
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.stop().await?;
        self.start().await
    }

    /// SIGSTOP for the whole node, or for the postmaster alone (then it accepts connections and never answers, while
    /// open sessions go on).
    pub fn pause(&mut self, reach: Reach) {
        if let Some(child) = &mut self.child {
            child.pause(reach);
        }
    }

    pub fn resume(&mut self) {
        if let Some(child) = &mut self.child {
            child.resume();
        }
    }

    /// Reads the configuration again.
    ///
    /// # Errors
    /// When it does not run.
    pub fn reload(&mut self) -> anyhow::Result<()> {
        self.child.as_mut().with_context(|| format!("{} does not run", self.name))?.signal(Signal::SIGHUP)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.ended().is_none())
    }

    /// A new connection to `tier0_db`.
    ///
    /// # Errors
    /// When it fails or takes more than 30 s.
    pub async fn connect(&self, role: Role) -> anyhow::Result<Db> {
        connect_within(&self.config(role), SESSION)
            .await
            .with_context(|| format!("connect to {} as {}", self.name, role.name()))
    }

    /// How to connect to `tier0_db`, for clients of the test's own.
    #[must_use]
    pub fn config(&self, role: Role) -> Config {
        config(self.port(), &self.passwords, role, DATABASE)
    }

    /// As [`Postgres::connect`], to the maintenance database `postgres`.
    ///
    /// # Errors
    /// When it fails or takes more than 30 s.
    pub async fn admin(&self) -> anyhow::Result<Db> {
        connect_within(&self.admin_config(), SESSION)
            .await
            .with_context(|| format!("connect to {} as {}", self.name, Role::Admin.name()))
    }

    /// Whether it accepts writes now; one that does not say within 5 s does not.
    pub(crate) async fn is_writable(&self) -> bool {
        let Ok(db) = connect(&self.admin_config()).await else { return false };
        let row = db.query_one("SELECT pg_is_in_recovery()", &[]).await;
        row.is_ok_and(|row| !row.get::<_, bool>(0))
    }

    fn admin_config(&self) -> Config {
        config(self.port(), &self.passwords, Role::Admin, "postgres")
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The postmaster's, whoever its parent is; `None` when it is not running.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        let others = || LockFile::read(&self.data.join("postmaster.pid")).map(|lock| lock.pid);
        self.child.as_ref().map(Child::pid).or_else(|| others().filter(|pid| procfs::lives(*pid)))
    }

    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    #[must_use]
    pub fn passwords(&self) -> &Passwords {
        &self.passwords
    }

    /// A killed postmaster whose parent was killed too is a zombie until process 1 reaps it, and Postgres takes a zombie
    /// for a living postmaster. Its lock file may go when nothing is attached to its shared memory any more, which is
    /// what Postgres itself looks at.
    async fn clear_dead_postmaster(&self) -> anyhow::Result<()> {
        let path = self.data.join("postmaster.pid");
        let Some(lock) = LockFile::read(&path) else { return Ok(()) };
        if procfs::lives(lock.pid) {
            return Ok(());
        }
        let deadline = Instant::now() + STOP;
        while lock.shared_memory.is_some_and(|id| procfs::attached(id) > 0) {
            if Instant::now() > deadline {
                bail!("{}: processes of the killed postmaster {} still run", self.name, lock.pid);
            }
            tokio::time::sleep(POLL).await;
        }
        std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Beside the data directory, so that a clone of the data does not carry it along.
    fn passfile(&self) -> PathBuf {
        self.data.with_extension("pgpass")
    }

    pub(crate) fn make_parent(&self) -> anyhow::Result<()> {
        // They may not write the parent directory; an empty one that belongs to them is what they accept as well.
        crate::account::private_dir(&self.data, self.account.as_ref())
    }

    async fn tool(&self, tool: &str, args: Vec<String>) -> anyhow::Result<()> {
        Start::new(format!("{tool} for {}", self.name), shipped::postgres_bin()?.join(tool), &self.log)
            .args(args)
            .account(self.account.clone())
            .run(Duration::from_secs(600))
            .await
    }
}

impl Drop for Postgres {
    /// Immediate shutdown, so that Postgres frees its shared memory itself; what a killed one left is freed here.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let shared = procfs::mapped(child.pid(), SHARED_MEMORY);
            child.stop_blocking(Signal::SIGQUIT, QUIT);
            if child.ended().is_none() {
                self.orphaned.extend(shared);
            }
        }
        for path in &self.orphaned {
            drop(std::fs::remove_file(path));
        }
        if let Some(LockFile { pid, shared_memory: Some(id) }) =
            LockFile::read(&self.data.join("postmaster.pid"))
            && !procfs::lives(pid)
            && procfs::attached(id) == 0
        {
            let removed = std::process::Command::new("ipcrm").args(["-m", &id.to_string()]).output();
            tracing::debug!(id, ok = removed.is_ok(), "shared memory of a killed postmaster freed");
        }
    }
}
