//! Finding the primary, and a pool of connections to it.
//!
//! Every node is watched all the time ([`sight`]): the one that is not in recovery and has the highest timeline is
//! the primary, and connections to any other end at once. A timeline below one already seen is never accepted again,
//! so an old primary that comes back is not believed; each connection is checked when it is taken from the pool.

mod connection;
mod handshake;
mod sight;
mod words;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::{
    Client, Connect, Hook, HookError, Manager, ManagerConfig, Pool, PoolError, RecyclingMethod, Runtime,
};
use prometheus::IntCounter;
use service::health::Dependency;
use tokio::time::timeout;
use tokio_postgres::{Config, NoTls};

use crate::failure::WriteError;
use crate::settings::DatabaseSettings;
use connection::{Opened, idle_driver};
use handshake::{OpenError, role};
use sight::{Sight, Watching};
use words::{explain, full};

/// Connections to the primary, wherever it is.
#[derive(Debug, Clone)]
pub struct Database {
    pool: Pool,
    watching: Arc<Watching>,
    settings: DatabaseSettings,
    health: Dependency,
    /// Why nothing may be written to the tables, as somebody has changed them.
    fault: Arc<Mutex<Option<String>>>,
}

impl Database {
    /// Begins to look for the primary; a runtime must be there. `connections` is the most that are open to it at once.
    ///
    /// # Errors
    /// When the settings name no node.
    pub fn new(settings: &DatabaseSettings, connections: usize, health: Dependency) -> anyhow::Result<Self> {
        let nodes = settings.nodes().map_err(anyhow::Error::msg)?;
        let mut config = Config::new();
        config
            .dbname(&settings.name)
            .user(&settings.user)
            .application_name("tier0-ingest")
            .connect_timeout(settings.connect_timeout)
            .keepalives_idle(Duration::from_secs(5))
            .keepalives_interval(Duration::from_secs(1))
            .keepalives_retries(3)
            .tcp_user_timeout(settings.commit_timeout);
        if !settings.password.is_empty() {
            config.password(settings.password.expose());
        }
        let refusals = IntCounter::new(
            "ingest_database_sessions_refused_total",
            "Postgres sessions that were opened but not used, because rows could be lost through them; the health endpoint gives the reason",
        )
        .context("make the counter of refused sessions")?;
        let patience = settings.connect_timeout;
        let watching = Arc::new(Watching::begin(&config, nodes, patience, connections, refusals));
        let finder = Finder { sight: watching.sight.clone() };
        let manager =
            Manager::from_connect(config, finder, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let check = || {
            let sight = watching.sight.clone();
            Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
                let sight = sight.clone();
                Box::pin(async move {
                    // The pool's own timeouts do not cover hooks: a frozen node would hold the caller for ever.
                    let role = timeout(patience, role(client))
                        .await
                        .map_err(|_| HookError::message("the node does not answer"))?
                        .map_err(|error| HookError::message(error.to_string()))?;
                    sight.admit(role).map_err(HookError::message)
                })
            })
        };
        let pool = Pool::builder(manager)
            .max_size(connections)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(settings.commit_timeout))
            .create_timeout(Some(settings.connect_timeout * 2))
            .recycle_timeout(Some(settings.connect_timeout))
            .post_create(check())
            .pre_recycle(check())
            .build()
            .context("build the connection pool")?;
        Ok(Self { pool, watching, settings: settings.clone(), health, fault: Arc::default() })
    }

    /// A connection to the primary. Waits for one to appear as long as for an answer: whoever is in need of it knows of a
    /// promotion as soon as it is seen.
    ///
    /// # Errors
    /// [`WriteError::Retry`] when there is no primary now.
    pub async fn client(&self) -> Result<Client, WriteError> {
        if let Err(reason) = self.watching.sight.wait(self.settings.connect_timeout).await {
            self.health.down(reason.clone());
            return Err(WriteError::Retry(reason));
        }
        match self.pool.get().await {
            Ok(client) => Ok(client),
            Err(error) => {
                let reason = self.watching.sight.refusal().unwrap_or_else(|| in_words(&error));
                self.health.down(reason.clone());
                Err(WriteError::Retry(reason))
            }
        }
    }

    /// Sessions that were opened and not used.
    #[must_use]
    pub(crate) fn refusals(&self) -> IntCounter {
        self.watching.sight.refusals.clone()
    }

    /// How the pool stands now.
    #[must_use]
    pub(crate) fn status(&self) -> deadpool_postgres::Status {
        self.pool.status()
    }

    #[must_use]
    pub fn commit_timeout(&self) -> Duration {
        self.settings.commit_timeout
    }

    /// A commit has succeeded. A connection alone says little: a standby may be away, and every commit with it.
    pub fn works(&self) {
        self.health.up();
    }

    /// How many nodes there are, primary or not.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.watching.sight.nodes()
    }

    /// A session with one node, whatever it is. Not one of the pool's: it ends when it is dropped.
    ///
    /// # Errors
    /// [`WriteError::Retry`] when the node does not take it in time.
    pub async fn open(&self, node: usize) -> Result<tokio_postgres::Client, WriteError> {
        self.watching.sight.open(node).await
    }

    /// The tables would not keep what they are given, for this reason; `None`: they would.
    pub(crate) fn set_fault(&self, fault: Option<String>) {
        let mut known = self.fault();
        if *known != fault {
            match &fault {
                Some(fault) => {
                    tracing::error!(fault, "nothing is written or acknowledged until this is mended")
                }
                None => tracing::info!("the tables are as they should be again"),
            }
        }
        if let Some(fault) = &fault {
            self.health.down(fault.clone());
        }
        *known = fault;
    }

    /// # Errors
    /// [`WriteError::Schema`] while there is a fault.
    pub(crate) fn check_fault(&self) -> Result<(), WriteError> {
        self.fault().clone().map_or(Ok(()), |fault| Err(WriteError::Schema(fault)))
    }

    fn fault(&self) -> MutexGuard<'_, Option<String>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tables refuse what they took before.
    pub fn refuses(&self, reason: &str) {
        self.health.down(reason);
    }

    /// Throws a connection away instead of giving it back: its state is unknown.
    pub fn discard(&self, client: Client, reason: &str) {
        drop(Client::take(client));
        self.health.down(reason);
    }
}

/// The server's reason where it gave one.
fn in_words(error: &PoolError) -> String {
    match error {
        PoolError::Backend(error) => explain(error),
        other => full(other).trim().to_owned(),
    }
}

#[derive(Debug)]
struct Finder {
    sight: Arc<Sight>,
}

type Opening<'a> = Pin<Box<dyn Future<Output = Result<Opened, tokio_postgres::Error>> + Send + 'a>>;

impl Connect for Finder {
    fn connect(&self, _: &Config) -> Opening<'_> {
        Box::pin(async move {
            match self.sight.connect().await {
                Ok(Some(opened)) => Ok(opened),
                Err(OpenError::Driver(error)) => Err(error),
                // It timed out, or was refused. The driver has no error of that name; connecting nowhere gives a genuine one.
                Ok(None) | Err(OpenError::Refused(_)) => {
                    Config::new().connect(NoTls).await.map(|(client, _)| (client, idle_driver()))
                }
            }
        })
    }
}
