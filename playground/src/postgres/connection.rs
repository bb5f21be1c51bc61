//! Who connects to a node, with which password, and the connection itself.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_postgres::{Client, Config, NoTls};

const CONNECT: Duration = Duration::from_secs(5);

/// Who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The superuser, for setting things up and for looking into the server.
    Admin,
    /// `tier0`: owner of the database, what mqtt-consumer and our checks use. Not a superuser.
    Owner,
    /// Adds and changes rows, makes no tables: what rabbitmq-consumer uses.
    Writer,
    /// Streams WAL.
    Replicator,
    /// Looks at the server's own statistics, for probes and exporters. Sees no table.
    Monitor,
    /// Reads every table, for dashboards. Writes nothing.
    Reader,
}

impl Role {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "postgres",
            Self::Owner => "tier0",
            Self::Writer => "writer",
            Self::Replicator => "replicator",
            Self::Monitor => "monitor",
            Self::Reader => "reader",
        }
    }
}

/// Passwords of one playground, made when its data directory is made.
#[derive(Clone, Serialize, Deserialize)]
pub struct Passwords {
    admin: String,
    owner: String,
    #[serde(default)]
    writer: String,
    replicator: String,
    #[serde(default)]
    monitor: String,
    #[serde(default)]
    reader: String,
}

impl Passwords {
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn random() -> anyhow::Result<Self> {
        Ok(Self {
            admin: random_word()?,
            owner: random_word()?,
            writer: random_word()?,
            replicator: random_word()?,
            monitor: random_word()?,
            reader: random_word()?,
        })
    }

    /// Those of an older playground lack some roles.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        [&self.writer, &self.monitor, &self.reader].iter().all(|password| !password.is_empty())
    }

    #[must_use]
    pub fn of(&self, role: Role) -> &str {
        match role {
            Role::Admin => &self.admin,
            Role::Owner => &self.owner,
            Role::Writer => &self.writer,
            Role::Replicator => &self.replicator,
            Role::Monitor => &self.monitor,
            Role::Reader => &self.reader,
        }
    }
}

impl std::fmt::Debug for Passwords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passwords(<hidden>)")
    }
}

pub(crate) fn random_word() -> anyhow::Result<String> {
    use std::io::Read;
    let mut bytes = [0_u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A connection and the task that drives it; both end when it is dropped.
#[derive(Debug)]
pub struct Db {
    client: Client,
    _driver: JoinSet<()>,
}

impl Deref for Db {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Db {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.client
    }
}

pub(crate) fn config(port: u16, passwords: &Passwords, role: Role, database: &str) -> Config {
    let mut config = Config::new();
    config
        .host("127.0.0.1")
        .port(port)
        .user(role.name())
        .password(passwords.of(role))
        .dbname(database)
        .application_name("playground")
        .connect_timeout(CONNECT);
    // The other roles are looked at as they are: what they may not do is part of their settings.
    if matches!(role, Role::Admin | Role::Owner | Role::Writer) {
        config.options(wire::postgres::options());
    }
    config
}

/// Opens a connection within 5 s in all: `connect_timeout` covers TCP only, and a frozen server accepts TCP.
///
/// # Errors
/// When the server refuses or does not answer.
pub async fn connect(config: &Config) -> anyhow::Result<Db> {
    connect_within(config, CONNECT).await
}

pub(crate) async fn connect_within(config: &Config, limit: Duration) -> anyhow::Result<Db> {
    let (client, connection) = tokio::time::timeout(limit, config.connect(NoTls))
        .await
        .with_context(|| format!("no answer within {limit:?}"))??;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "database connection ended");
        }
    });
    Ok(Db { client, _driver: driver })
}
