//! Finding the primary, and a pool of connections to it.
//!
//! Every new connection asks all nodes at once and keeps the one that is not in recovery and has the highest
//! timeline; a timeline below one already seen is never accepted again, so an old primary that comes back is not
//! believed. The same check runs each time a connection is taken from the pool.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::{
    Client, Connect, Hook, HookError, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime,
};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use service::health::Dependency;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::error::Severity;
use tokio_postgres::{AsyncMessage, Config, NoTls};

use crate::failure::WriteError;
use crate::settings::DatabaseSettings;

/// How long a node that has not answered yet may hold up a primary that has: a frozen node must not stall a
/// failover, and a slow new primary must not lose to a quick old one.
const STRAGGLER_WAIT: Duration = Duration::from_millis(300);

/// Connections to the primary, wherever it is.
#[derive(Debug, Clone)]
pub struct Database {
    pool: Pool,
    settings: DatabaseSettings,
    health: Dependency,
}

impl Database {
    /// Opens no connection yet. `connections` is the most that are open at once.
    ///
    /// # Errors
    /// When the settings name no node.
    pub fn new(settings: &DatabaseSettings, connections: usize, health: Dependency) -> anyhow::Result<Self> {
        let finder = Finder {
            nodes: settings.nodes().map_err(anyhow::Error::msg)?,
            connect_timeout: settings.connect_timeout,
            highest_timeline: Arc::new(AtomicU32::new(0)),
        };
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
        let highest = finder.highest_timeline.clone();
        let manager =
            Manager::from_connect(config, finder, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let patience = settings.connect_timeout;
        let check = move || {
            let highest = highest.clone();
            Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
                let highest = highest.clone();
                Box::pin(async move {
                    // The pool's own timeouts do not cover hooks: a frozen node would hold the caller for ever.
                    let standing = timeout(patience, standing(client))
                        .await
                        .map_err(|_| HookError::message("the node does not answer"))?
                        .map_err(HookError::Backend)?;
                    refuse_standby(standing, &highest).map_err(HookError::message)
                })
            })
        };
        let pool = Pool::builder(manager)
            .max_size(connections)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(settings.commit_timeout))
            .create_timeout(Some(settings.connect_timeout * 2 + STRAGGLER_WAIT))
            .recycle_timeout(Some(settings.connect_timeout))
            .post_create(check())
            .pre_recycle(check())
            .build()
            .context("build the connection pool")?;
        Ok(Self { pool, settings: settings.clone(), health })
    }

    /// A connection to the primary.
    ///
    /// # Errors
    /// [`WriteError::Retry`] when there is no primary now.
    pub async fn client(&self) -> Result<Client, WriteError> {
        match self.pool.get().await {
            Ok(client) => Ok(client),
            Err(error) => {
                let reason = full(&error).trim().to_owned();
                self.health.down(reason.clone());
                Err(WriteError::Retry(reason))
            }
        }
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

    /// Throws a connection away instead of giving it back: its state is unknown.
    pub fn discard(&self, client: Client, reason: &str) {
        drop(Client::take(client));
        self.health.down(reason);
    }
}

fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}

/// What a node says of itself: its timeline, or `None` while it is in recovery.
async fn standing(client: &tokio_postgres::Client) -> Result<Option<u32>, tokio_postgres::Error> {
    // The control file lags behind a promotion; the name of the WAL file being written does not.
    const SQL: &str = "SELECT CASE WHEN pg_is_in_recovery() THEN NULL \
        ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END";
    let row = client.query_one(SQL, &[]).await?;
    Ok(row.get::<_, Option<&str>>(0).and_then(|hex| u32::from_str_radix(hex, 16).ok()))
}

fn refuse_standby(standing: Option<u32>, highest: &AtomicU32) -> Result<(), String> {
    let Some(timeline) = standing else {
        return Err("no primary: the node that answered is in recovery".into());
    };
    let seen = highest.fetch_max(timeline, Ordering::SeqCst);
    if timeline < seen {
        return Err(format!("an old primary answered: timeline {timeline}, but {seen} was seen"));
    }
    Ok(())
}

#[derive(Debug)]
struct Finder {
    nodes: Vec<(String, u16)>,
    connect_timeout: Duration,
    highest_timeline: Arc<AtomicU32>,
}

type Opened = (tokio_postgres::Client, JoinHandle<()>);
type Opening<'a> = Pin<Box<dyn Future<Output = Result<Opened, tokio_postgres::Error>> + Send + 'a>>;

impl Connect for Finder {
    fn connect(&self, base: &Config) -> Opening<'_> {
        let base = base.clone();
        Box::pin(async move { self.find(&base).await })
    }
}

impl Finder {
    /// Asks all nodes at once. The best answer is returned even if it is a standby: the pool's check refuses it with
    /// a better message than an error made here could carry.
    async fn find(&self, base: &Config) -> Result<Opened, tokio_postgres::Error> {
        let mut answers: FuturesUnordered<_> =
            self.nodes.iter().map(|(host, port)| self.ask(base, host, *port)).collect();
        let mut best: Option<(Option<u32>, Opened)> = None;
        let mut failure = None;
        loop {
            let answer = if best.as_ref().is_some_and(|(standing, _)| self.is_acceptable(*standing)) {
                match timeout(STRAGGLER_WAIT, answers.next()).await {
                    Ok(answer) => answer,
                    Err(_) => break,
                }
            } else {
                answers.next().await
            };
            match answer {
                None => break,
                Some(Err(error)) => failure = Some(error),
                Some(Ok(None)) => {}
                Some(Ok(Some((standing, opened)))) => {
                    if best.as_ref().is_none_or(|(other, _)| standing > *other) {
                        best = Some((standing, opened));
                    }
                }
            }
        }
        match (best, failure) {
            (Some((_, opened)), _) => Ok(opened),
            (None, Some(error)) => Err(error),
            // All timed out. The driver has no error of that name; connecting nowhere gives a genuine one.
            (None, None) => Config::new().connect(NoTls).await.map(|(client, _)| (client, idle_driver())),
        }
    }

    fn is_acceptable(&self, standing: Option<u32>) -> bool {
        standing.is_some_and(|timeline| timeline >= self.highest_timeline.load(Ordering::SeqCst))
    }

    /// `Ok(None)` when the node did not answer in time.
    async fn ask(
        &self,
        base: &Config,
        host: &str,
        port: u16,
    ) -> Result<Option<(Option<u32>, Opened)>, tokio_postgres::Error> {
        let mut config = base.clone();
        config.host(host).port(port);
        let opened = timeout(self.connect_timeout, async {
            let (client, connection) = config.connect(NoTls).await?;
            let in_use = Arc::new(AtomicBool::new(false));
            let driver = drive(connection, in_use.clone());
            let standing = standing(&client).await?;
            in_use.store(true, Ordering::SeqCst);
            Ok((standing, (client, driver)))
        });
        match opened.await {
            Ok(outcome) => outcome.map(Some),
            Err(_) => Ok(None),
        }
    }
}

/// Runs a connection's input and output. It ends, and every call on the client fails, when the server says that it
/// gave up waiting for the standby: the COMMIT that follows would report success for a row that is on one machine.
#[allow(clippy::disallowed_methods, reason = "the pool owns the task's handle and aborts it with the client")]
fn drive<S, T>(mut connection: tokio_postgres::Connection<S, T>, in_use: Arc<AtomicBool>) -> JoinHandle<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        loop {
            match std::future::poll_fn(|context| connection.poll_message(context)).await {
                Some(Ok(AsyncMessage::Notice(notice))) => {
                    // At login a server may warn of itself (a changed collation): that is no commit's outcome.
                    let unreplicated = in_use.load(Ordering::SeqCst)
                        && is_unreplicated(notice.parsed_severity(), notice.code().code(), notice.where_());
                    if unreplicated {
                        tracing::error!(
                            notice = notice.message(),
                            "a commit is not on the standby; connection dropped"
                        );
                        return;
                    }
                    tracing::debug!(notice = notice.message(), "notice from Postgres");
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::debug!(%error, "connection to Postgres ended");
                    return;
                }
                None => return,
            }
        }
    })
}

/// Whether a notice says that the server gave up waiting for the standby. Its words depend on the server's language, its
/// fields do not: a warning of the generic code, or of a shutdown, with no statement it happened in (a trigger's warning
/// names its function). COMMIT has no other warning; a wrong yes costs one more try of the batch, a wrong no a promise.
fn is_unreplicated(severity: Option<Severity>, code: &str, context: Option<&str>) -> bool {
    severity == Some(Severity::Warning) && matches!(code, "01000" | "57P01") && context.is_none()
}

#[allow(clippy::disallowed_methods, reason = "only to fill the pool's type on a path that returns an error")]
fn idle_driver() -> JoinHandle<()> {
    tokio::spawn(async {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_given_up_is_known_by_its_fields() {
        let trigger = Some("PL/pgSQL function x() line 1 at RAISE");
        for (severity, code, context, expected) in [
            // canceling wait for synchronous replication due to user request
            (Severity::Warning, "01000", None, true),
            // canceling the wait for synchronous replication and terminating connection due to administrator command
            (Severity::Warning, "57P01", None, true),
            (Severity::Warning, "25P01", None, false), // ROLLBACK after a COPY that failed: no transaction
            (Severity::Warning, "01000", trigger, false),
            (Severity::Notice, "01000", None, false),
            (Severity::Notice, "42P07", None, false), // the temporary table is there already
        ] {
            assert_eq!(is_unreplicated(Some(severity), code, context), expected, "{severity:?} {code}");
        }
        assert!(!is_unreplicated(None, "01000", None));
    }

    #[test]
    fn an_old_primary_is_never_believed_again() {
        let highest = AtomicU32::new(0);
        assert!(refuse_standby(Some(1), &highest).is_ok());
        assert!(refuse_standby(None, &highest).unwrap_err().contains("recovery"));
        assert!(refuse_standby(Some(3), &highest).is_ok());
        assert!(refuse_standby(Some(2), &highest).unwrap_err().contains("timeline 2"));
        assert!(refuse_standby(Some(3), &highest).is_ok());
    }
}
