//! Our own view of each Postgres, independent of its agent: a session that is asked a few times a second.

use std::sync::Arc;
use std::time::Duration;

use prometheus::Histogram;
use service::secret::Secret;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_postgres::{Config, NoTls};
use tokio_util::sync::CancellationToken;

use crate::orchestrator::watch::Watched;
use crate::protocol::Upstream;

/// Longest wait for a session or an answer.
const LIMIT: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_millis(50);

/// One node to probe.
#[derive(Debug, Clone)]
pub struct Probe {
    pub node: String,
    pub address: Upstream,
    pub user: String,
    pub password: Secret,
    pub every: Duration,
    pub watched: Arc<Watched>,
    pub seconds: Histogram,
}

impl Probe {
    /// Probes until the token is cancelled.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut config = Config::new();
        config
            .host(&self.address.host)
            .port(self.address.port)
            .user(&self.user)
            .password(self.password.expose())
            .dbname("postgres")
            .application_name("failover-probe")
            .connect_timeout(LIMIT)
            // A time-out set for the role must not make a healthy node look dead.
            .options(wire::postgres::options());
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.follow(&config) => {}
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// One session, until it fails. A closed connection is noticed at once and tried anew.
    async fn follow(&self, config: &Config) {
        let (client, connection) = match timeout(LIMIT, config.connect(NoTls)).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => {
                let refused = refused(&error);
                self.watched.note(&self.node, |seen| seen.probe_refused = refused);
                return;
            }
            Err(_) => return self.watched.note(&self.node, |seen| seen.probe_refused = false),
        };
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        loop {
            let started = Instant::now();
            match timeout(LIMIT, client.simple_query("SELECT 1")).await {
                Ok(Ok(_)) => {
                    self.seconds.observe(started.elapsed().as_secs_f64());
                    let now = self.watched.now();
                    self.watched.note(&self.node, |seen| {
                        seen.probed = Some(now);
                        seen.probe_refused = false;
                    });
                }
                Ok(Err(_)) | Err(_) => return,
            }
            // Whichever comes first: the end of the session or the time for the next question.
            if timeout(self.every, driver.join_next()).await.is_ok() {
                return;
            }
        }
    }
}

fn refused(error: &tokio_postgres::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionRefused)
}
