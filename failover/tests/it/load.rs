//! Writers as ours are: through `ingest`'s primary finder, one commit after another, tried again until acknowledged.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ingest::database::Database;
use ingest::settings::DatabaseSettings;
use service::health::Health;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::fixture::{LIMIT, answered};

const WRITERS: i64 = 2;
const ROWS: i64 = 20;

/// Writers at work.
pub(crate) struct Load {
    database: Database,
    stop: CancellationToken,
    writers: JoinSet<()>,
    commits: Arc<Mutex<Vec<Commit>>>,
}

/// One acknowledged commit.
#[derive(Clone, Copy)]
struct Commit {
    writer: i64,
    batch: i64,
    at: Instant,
}

impl Load {
    pub(crate) async fn start(settings: &DatabaseSettings) -> Self {
        let connections = usize::try_from(WRITERS).unwrap() + 1;
        let database =
            Database::new(settings, connections, Health::default().dependency("postgres")).unwrap();
        let sql = "CREATE TABLE IF NOT EXISTS written (writer bigint, batch bigint, row bigint, PRIMARY KEY (writer, batch, row))";
        answered("make the table", async || {
            let client = database.client().await?;
            if let Err(error) = client.batch_execute(sql).await {
                database.discard(client, &error.to_string());
                return Err(error.into());
            }
            Ok(())
        })
        .await;
        let commits = Arc::new(Mutex::new(Vec::new()));
        let stop = CancellationToken::new();
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            writers.spawn(write(database.clone(), writer, commits.clone(), stop.clone()));
        }
        let load = Self { database, stop, writers, commits };
        load.commits_after(Instant::now(), 20).await;
        load
    }

    /// Waits until so many commits were acknowledged after `since`.
    pub(crate) async fn commits_after(&self, since: Instant, wanted: usize) {
        let deadline = Instant::now() + LIMIT;
        while self.commits.lock().unwrap().iter().filter(|commit| commit.at > since).count() < wanted {
            assert!(Instant::now() < deadline, "no {wanted} commits within {LIMIT:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether nothing new was acknowledged. A batch that the standby had got before its primary died, and that is
    /// found there when it is tried again, is on two disks already: one for each writer.
    pub(crate) fn is_silent_since(&self, since: Instant) -> bool {
        let commits = self.commits.lock().unwrap();
        (0..WRITERS).all(|writer| commits.iter().filter(|c| c.writer == writer && c.at > since).count() <= 1)
    }

    /// The longest time without an acknowledged commit, around or after `since`.
    pub(crate) fn gap_since(&self, since: Instant) -> Duration {
        let mut times: Vec<Instant> = self.commits.lock().unwrap().iter().map(|commit| commit.at).collect();
        times.sort();
        times
            .windows(2)
            .filter(|pair| pair[1] > since)
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap_or_default()
    }

    /// Stops the writers and counts what they were told against what is there: every row once, and no other.
    pub(crate) async fn finish(mut self) {
        self.stop.cancel();
        while let Some(ended) = self.writers.join_next().await {
            ended.unwrap();
        }
        let rows = answered("what is stored", async || {
            let client = self.database.client().await?;
            let rows = client.query("SELECT writer, batch, count(*) FROM written GROUP BY 1, 2", &[]).await;
            if let Err(error) = &rows {
                self.database.discard(client, &error.to_string());
            }
            Ok(rows?)
        })
        .await;
        let stored: std::collections::BTreeMap<(i64, i64), i64> =
            rows.iter().map(|row| ((row.get(0), row.get(1)), row.get(2))).collect();
        let commits = self.commits.lock().unwrap();
        let missing = |commit: &&Commit| stored.get(&(commit.writer, commit.batch)) != Some(&ROWS);
        let lost: Vec<_> = commits.iter().filter(missing).map(|c| (c.writer, c.batch)).collect();
        let acknowledged = i64::try_from(commits.len()).unwrap() * ROWS;
        println!("{acknowledged} rows acknowledged");
        assert!(lost.is_empty(), "acknowledged and not stored: {lost:?}");
        assert_eq!(stored.values().sum::<i64>(), acknowledged, "stored and not acknowledged");
    }
}

/// Whether the writers waited no longer than `most`, in rounds of one kind. The best round has no more than that; that the median may have
/// four times as much leaves room for whatever else runs on the machine, and none for a round in two that takes another way.
pub(crate) fn judge(mut gaps: Vec<Duration>, most: Duration) {
    gaps.sort();
    let (best, median) = (gaps[0], gaps[gaps.len() / 2]);
    assert!(best <= most && median <= 4 * most, "no commit for {gaps:?}; at most {most:?} are expected");
}

async fn write(database: Database, writer: i64, commits: Arc<Mutex<Vec<Commit>>>, stop: CancellationToken) {
    for batch in 0.. {
        while !attempt(&database, writer, batch).await {
            sleep(Duration::from_millis(5)).await;
        }
        commits.lock().unwrap().push(Commit { writer, batch, at: Instant::now() });
        if stop.is_cancelled() {
            return;
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// One try; the identity of the rows makes another one harmless.
async fn attempt(database: &Database, writer: i64, batch: i64) -> bool {
    let Ok(client) = database.client().await else { return false };
    let sql = "INSERT INTO written SELECT $1, $2, generate_series(1, $3::bigint) ON CONFLICT DO NOTHING";
    match timeout(database.commit_timeout(), client.execute(sql, &[&writer, &batch, &ROWS])).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => {
            database.discard(client, &error.to_string());
            false
        }
        Err(_) => {
            database.discard(client, "no answer in time");
            false
        }
    }
}
