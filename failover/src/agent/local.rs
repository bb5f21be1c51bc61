//! The agent's own sessions with its Postgres.
//!
//! A statement that does not answer in time drops its session and is never cancelled: a cancelled wait for
//! replication would report a commit that is on one machine only.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use failover_api::Lsn;
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::sync::{Notify, OnceCell};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, Statement};

use crate::agent::conf::parse_names;
use crate::agent::settings::RegionAgent;
use crate::agent::shared::Shared;
use crate::protocol::{Attached, Receiver, Sample, Upstream};

const CONNECT: Duration = Duration::from_secs(2);

/// How to reach this node's, or with [`Local::of`] another node's, Postgres.
#[derive(Debug, Clone)]
pub struct Local {
    config: Config,
    /// Told of the end of each session.
    ended: Arc<Notify>,
}

/// One session that is open already when an order comes: logging in costs as much as promoting.
#[derive(Debug)]
pub struct Ready {
    local: Local,
    shared: Arc<Shared>,
    session: Mutex<Option<(u64, Session)>>,
}

impl Ready {
    #[must_use]
    pub fn new(local: Local, shared: Arc<Shared>) -> Self {
        Self { local, shared, session: Mutex::default() }
    }

    /// A session with the running Postgres; a new one when none is ready.
    ///
    /// # Errors
    /// When none can be opened.
    pub async fn take(&self) -> anyhow::Result<(u64, Session)> {
        let life = self.shared.life();
        let ready = self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
        match ready.filter(|(of, session)| *of == life && !session.client.is_closed()) {
            Some(ready) => Ok(ready),
            None => Ok((life, self.local.open().await?)),
        }
    }

    /// Gives back a session that is known to be idle and well.
    pub fn put(&self, session: (u64, Session)) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
    }

    /// Opens one if none is ready.
    pub async fn warm(&self) {
        let life = self.shared.life();
        let ready = {
            let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
            session.as_ref().is_some_and(|(of, session)| *of == life && !session.client.is_closed())
        };
        if !ready && let Ok(session) = self.local.open().await {
            self.put((life, session));
        }
    }
}

/// One session; it ends when dropped.
#[derive(Debug)]
pub struct Session {
    pub client: Client,
    sampling: OnceCell<Statement>,
    _driver: JoinSet<()>,
}

impl Local {
    #[must_use]
    pub fn new(settings: &RegionAgent, shared: &Shared) -> Self {
        let mut config = Config::new();
        config
            .host(&settings.host)
            .port(settings.port)
            .user(&settings.user)
            .password(settings.password.expose())
            .dbname("postgres")
            .application_name("region-agent")
            .connect_timeout(CONNECT)
            // Ours must go through whatever is set for role and database.
            .options(wire::postgres::options());
        Self { config, ended: shared.session_ended.clone() }
    }

    /// Another node, by the replication role.
    #[must_use]
    pub fn of(settings: &RegionAgent, upstream: &Upstream) -> Self {
        let mut config = Config::new();
        config
            .host(&upstream.host)
            .port(upstream.port)
            .user(&settings.replication_user)
            .password(settings.replication_password.expose())
            .dbname("postgres")
            .connect_timeout(CONNECT)
            .options(wire::postgres::options());
        Self { config, ended: Arc::default() }
    }

    /// # Errors
    /// When there is no session within 2 s.
    pub async fn open(&self) -> anyhow::Result<Session> {
        let (client, connection) = timeout(CONNECT, self.config.connect(NoTls))
            .await
            .map_err(|_| anyhow!("no session within {CONNECT:?}"))?
            .context("open a session")?;
        // Also when the session is dropped: whoever was answered with the server's last words drops it first.
        let (mut driver, told) = (JoinSet::new(), Told(self.ended.clone()));
        driver.spawn(async move {
            let _told = told;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "session ended");
            }
        });
        Ok(Session { client, sampling: OnceCell::new(), _driver: driver })
    }
}

/// Tells of its end.
struct Told(Arc<Notify>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// Everything the orchestrator wants to know, in one statement.
const SAMPLE: &str = "
WITH r AS (SELECT pg_is_in_recovery() AS rec)
SELECT rec,
  CASE WHEN rec THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver), (SELECT timeline_id FROM pg_control_checkpoint()))
       ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END,
  CASE WHEN rec THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn(), '0/0'::pg_lsn)
       ELSE pg_current_wal_flush_lsn() END::text,
  CASE WHEN rec THEN pg_last_wal_replay_lsn()::text END,
  CASE WHEN rec THEN pg_is_wal_replay_paused() ELSE false END,
  current_setting('synchronous_standby_names'),
  (SELECT json_build_object('streaming', status = 'streaming', 'host', coalesce(sender_host, ''),
      'port', coalesce(sender_port, 0), 'silent_ms', greatest(0, extract(epoch FROM clock_timestamp() - last_msg_receipt_time) * 1000)::bigint)
   FROM pg_stat_wal_receiver),
  (SELECT coalesce(json_agg(json_build_object('node', application_name, 'streaming', state = 'streaming',
      'sync', sync_state IN ('sync', 'quorum'), 'slot', (SELECT slot_name FROM pg_replication_slots s WHERE s.active_pid = w.pid), 'flushed', coalesce(flush_lsn, '0/0')::text,
      'replayed', coalesce(replay_lsn, '0/0')::text)), '[]')
   FROM pg_stat_replication w WHERE application_name <> 'pg_basebackup' AND application_name <> 'pg_rewind'),
  CASE WHEN rec AND pg_last_wal_receive_lsn() IS DISTINCT FROM pg_last_wal_replay_lsn()
       THEN coalesce(extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()), 0)::float8 ELSE 0 END
FROM r";

impl Session {
    /// # Errors
    /// When there is no answer within `limit`.
    pub async fn sample(&self, limit: Duration) -> anyhow::Result<Sample> {
        let asked = async {
            let statement = self.sampling.get_or_try_init(|| self.client.prepare(SAMPLE)).await?;
            self.client.query_one(statement, &[]).await
        };
        let row = timeout(limit, asked)
            .await
            .map_err(|_| anyhow!("no sample within {limit:?}"))?
            .context("sample")?;
        let lsn = |text: Option<&str>| text.and_then(|text| text.parse::<Lsn>().ok());
        let json = |index: usize| row.try_get::<_, Option<serde_json::Value>>(index);
        let receiver = json(6)?.map(Receiver::deserialize).transpose().context("read the WAL receiver")?;
        let standbys = json(7)?.map(Vec::<Attached>::deserialize).transpose().context("read the standbys")?;
        Ok(Sample {
            in_recovery: row.try_get(0)?,
            timeline: u32::try_from(row.try_get::<_, Option<i32>>(1)?.unwrap_or(0)).unwrap_or(0),
            lsn: lsn(row.try_get(2)?).unwrap_or_default(),
            replayed: lsn(row.try_get(3)?),
            replay_paused: row.try_get(4)?,
            wait_for: parse_names(row.try_get(5)?),
            receiver,
            standbys: standbys.unwrap_or_default(),
            lag_seconds: row.try_get(8)?,
            age_ms: 0,
        })
    }

    /// The one process that replays WAL, and will carry out a promotion; none in a primary.
    ///
    /// # Errors
    /// When there is no answer within `limit`.
    pub async fn replays(&self, limit: Duration) -> anyhow::Result<Option<Pid>> {
        let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'startup'";
        let row = timeout(limit, self.client.query_opt(sql, &[]))
            .await
            .map_err(|_| anyhow!("no answer within {limit:?}"))?
            .context("ask who replays")?;
        Ok(row.map(|row| row.try_get(0)).transpose().context("read the answer")?.map(Pid::from_raw))
    }

    /// Ends the sessions that hold up replay, by a lock or by what they still see; all that are in a transaction when it does
    /// not tell which. Answers how many.
    ///
    /// # Errors
    /// When there is no answer within `limit`.
    pub async fn end_readers(&self, limit: Duration) -> anyhow::Result<i64> {
        let sql = "WITH startup AS (SELECT pid, wait_event_type, wait_event FROM pg_stat_activity WHERE backend_type = 'startup'),
          held AS (SELECT 1 FROM startup WHERE wait_event_type = 'Lock' OR wait_event LIKE 'RecoveryConflict%' OR wait_event = 'BufferPin')
          SELECT count(pg_terminate_backend(a.pid)) FROM pg_stat_activity a, held
          WHERE a.backend_type = 'client backend' AND a.pid <> pg_backend_pid() AND a.application_name <> 'region-agent'
            AND (a.xact_start IS NOT NULL OR a.backend_xmin IS NOT NULL)";
        let row = timeout(limit, self.client.query_one(sql, &[]))
            .await
            .map_err(|_| anyhow!("no answer within {limit:?}"))?
            .context("end the readers")?;
        Ok(row.try_get(0)?)
    }

    /// Whether the running Postgres has read that it follows nobody.
    ///
    /// # Errors
    /// When there is no answer within `limit`.
    pub async fn follows_nobody(&self, limit: Duration) -> anyhow::Result<bool> {
        self.whether("SELECT current_setting('primary_conninfo') = ''", limit).await
    }

    /// The least that can be asked.
    ///
    /// # Errors
    /// When there is no answer within `limit`.
    pub async fn is_in_recovery(&self, limit: Duration) -> anyhow::Result<bool> {
        self.whether("SELECT pg_is_in_recovery()", limit).await
    }

    /// In one message each way.
    async fn whether(&self, sql: &str, limit: Duration) -> anyhow::Result<bool> {
        let answer = timeout(limit, self.client.simple_query(sql))
            .await
            .map_err(|_| anyhow!("no answer within {limit:?}: {sql}"))?
            .with_context(|| sql.to_owned())?;
        let rows = answer.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        rows.last().map(|word| word == "t").with_context(|| format!("no row: {sql}"))
    }

    /// Runs statements, at most so long.
    ///
    /// # Errors
    /// When they fail or do not end in time; then the session must be dropped.
    pub async fn run(&self, sql: &str, limit: Duration) -> anyhow::Result<()> {
        timeout(limit, self.client.batch_execute(sql))
            .await
            .map_err(|_| anyhow!("no answer within {limit:?}"))?
            .context("run a statement")
    }
}
