//! Writers of readings and sessions that go on whatever happens, and the ledger of what they were told is stored.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ingest::database::Database;
use ingest::settings::DatabaseSettings;
use playground::cluster::Cluster;
use playground::postgres::{Db, Role};
use service::health::Health;
use service::secret::Secret;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const WRITERS: usize = 2;
const ROWS: i64 = 20;
const LIMIT: Duration = Duration::from_secs(120);

/// A batch by the device that it is of, and when it was acknowledged.
type Acknowledged = Arc<Mutex<BTreeMap<String, Instant>>>;

pub(super) struct Writers {
    stop: CancellationToken,
    tasks: JoinSet<()>,
    acknowledged: Acknowledged,
}

impl Writers {
    /// Needs the tables of the product.
    pub(super) async fn start(cluster: &Cluster) -> Self {
        let hosts: Vec<String> =
            cluster.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        let settings = DatabaseSettings {
            hosts: hosts.join(","),
            password: Secret::new(cluster.primary().passwords().of(Role::Owner)),
            ..DatabaseSettings::default()
        };
        let health = Health::default().dependency("postgres");
        let database = Database::new(&settings, WRITERS, health).unwrap();
        let (stop, acknowledged) = (CancellationToken::new(), Acknowledged::default());
        let mut tasks = JoinSet::new();
        for writer in 0..WRITERS {
            tasks.spawn(write(database.clone(), writer, acknowledged.clone(), stop.clone()));
        }
        let writers = Self { stop, tasks, acknowledged };
        writers.commit_after(Instant::now()).await;
        writers
    }

    /// Waits until each writer has certainly begun and ended a batch after `since`.
    pub(super) async fn commit_after(&self, since: Instant) {
        let deadline = Instant::now() + LIMIT;
        let newer = || self.acknowledged.lock().unwrap().values().filter(|at| **at > since).count();
        while newer() < 5 * WRITERS {
            assert!(Instant::now() < deadline, "nothing was acknowledged within {LIMIT:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops the writers; what each was told.
    pub(super) async fn finish(mut self) -> Ledger {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        let acknowledged = std::mem::take(&mut *self.acknowledged.lock().unwrap());
        assert!(acknowledged.len() > 10 * WRITERS);
        Ledger(acknowledged.into_keys().collect())
    }
}

/// Every batch that was acknowledged.
pub(super) struct Ledger(Vec<String>);

impl Ledger {
    /// Every row of every batch is there, once, and no other; and every session.
    pub(super) async fn check(&self, name: &str, db: &Db) {
        let rows = "SELECT device_id, count(*) FROM device_telemetry GROUP BY 1";
        let rows = db.query(rows, &[]).await.unwrap();
        let stored: BTreeMap<String, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let lost: Vec<_> = self.0.iter().filter(|batch| stored.get(*batch) != Some(&ROWS)).collect();
        assert!(lost.is_empty(), "{name}: acknowledged and not stored: {lost:?}");
        assert_eq!(stored.len(), self.0.len(), "{name}: stored and not acknowledged");
        let sessions = db.query("SELECT session_id, username FROM user_sessions", &[]).await.unwrap();
        let sessions: BTreeMap<String, String> =
            sessions.iter().map(|row| (row.get(0), row.get(1))).collect();
        for batch in &self.0 {
            assert_eq!(sessions.get(batch), Some(batch), "{name}: the session of {batch}");
        }
        // One session of each writer is changed by every batch: the newest state holds.
        for writer in 0..WRITERS {
            let newest = self.0.iter().filter_map(|batch| number(batch, writer)).max().unwrap();
            let held = &sessions[&format!("w{writer}")];
            assert_eq!(number(held, writer), Some(newest), "{name}: the session of writer {writer}");
        }
        println!("{name}: {} rows, all there", stored.len() * usize::try_from(ROWS).unwrap());
    }
}

fn number(batch: &str, writer: usize) -> Option<u64> {
    batch.strip_prefix(&format!("w{writer}-"))?.parse().ok()
}

async fn write(database: Database, writer: usize, acknowledged: Acknowledged, stop: CancellationToken) {
    for number in 0_u64.. {
        let batch = format!("w{writer}-{number}");
        let at = jiff::Timestamp::now().to_string();
        while !attempt(&database, writer, &batch, &at).await {
            sleep(Duration::from_millis(5)).await;
        }
        acknowledged.lock().unwrap().insert(batch, Instant::now());
        if stop.is_cancelled() {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// One try; the identity of the rows makes another one harmless.
async fn attempt(database: &Database, writer: usize, batch: &str, at: &str) -> bool {
    let Ok(client) = database.client().await else { return false };
    let sql = format!(
        "BEGIN;
         INSERT INTO device_telemetry (device_id, device_type, site_id, timestamp_utc, metrics)
            SELECT '{batch}', 't', 's', timestamptz '{at}' + n * interval '1 microsecond', '{{}}' FROM generate_series(1, {ROWS}) n
            ON CONFLICT DO NOTHING;
         INSERT INTO user_sessions (session_id, user_id, username, connection_status, last_activity)
            VALUES ('{batch}', 'u', '{batch}', 'active', '{at}'), ('w{writer}', 'u', '{batch}', 'active', '{at}')
            ON CONFLICT (session_id) DO UPDATE SET username = excluded.username, last_activity = excluded.last_activity
            WHERE user_sessions.last_activity < excluded.last_activity;
         COMMIT"
    );
    let why = match timeout(database.commit_timeout(), client.batch_execute(&sql)).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    database.discard(client, &why);
    false
}
