//! Conservation checked against the table: keys of committed readings are read again some seconds later, on the primary and
//! on every standby.
//!
//! The counters of this process say what it believes; whatever makes it believe something false makes them balance too. So a
//! few keys of each batch are remembered, and asked for. A key that is not there was acknowledged and is lost.
//!
//! Nothing here can hold up a writer: what does not fit is not checked, and counted.

pub mod key;
mod node;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use deadpool_postgres::Client;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::batch::Batch;
use crate::batch::committed::in_time;
use crate::clock::Clock;
use crate::database::Database;
use crate::failure::WriteError;
use crate::metrics::AuditMetrics;
use key::{Chosen, Key};
use node::Standbys;

/// From a commit to the look: longer than a cancelled or aborted transaction could stay unseen, short enough that evidence
/// is still in the logs.
const DELAY: Duration = Duration::from_secs(5);
const PERIOD: Duration = Duration::from_secs(1);
/// Keys asked for at once.
const KEYS_AT_ONCE: usize = 500;
/// Keys remembered at most, on all nodes together; at 200 batches a second this is more than ten seconds.
const MAX_KEYS: usize = 10_000;
/// A standby that has not replayed a commit within this is not asked for it: that it lags is another alarm.
const STANDBY_PATIENCE: Duration = Duration::from_secs(60);

/// A key and when its commit was answered.
#[derive(Debug, Clone)]
struct Sample {
    key: Key,
    committed: Instant,
}

/// Where writers leave keys. Clones are the same.
#[derive(Debug, Clone)]
pub struct Audit {
    samples: Arc<Mutex<VecDeque<Sample>>>,
    metrics: AuditMetrics,
}

impl Audit {
    #[must_use]
    pub fn new(metrics: AuditMetrics) -> Self {
        Self { samples: Arc::default(), metrics }
    }

    /// Keys of a batch that is committed.
    pub fn note(&self, Chosen { keys, skipped }: Chosen) {
        self.metrics.skipped.inc_by(skipped as u64);
        let committed = Instant::now();
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        for key in keys {
            if samples.len() >= MAX_KEYS {
                self.metrics.skipped.inc();
            } else {
                samples.push_back(Sample { key, committed });
            }
        }
    }

    /// The oldest keys that are old enough.
    fn due(&self) -> Vec<Sample> {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let count = samples
            .iter()
            .take(KEYS_AT_ONCE)
            .take_while(|sample| sample.committed.elapsed() >= DELAY)
            .count();
        samples.drain(..count).collect()
    }

    /// These were not asked for: again later.
    fn put_back(&self, due: Vec<Sample>) {
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        for sample in due.into_iter().rev() {
            samples.push_front(sample);
        }
    }

    /// Reads keys again until shutdown. `B` is what the keys are of; readings older than `retention` may be gone rightly.
    pub async fn run<B: Batch>(
        self,
        database: Database,
        clock: Clock,
        retention: Option<Duration>,
        shutdown: CancellationToken,
    ) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut standbys = Standbys::new(&database);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let due = self.due();
            if due.is_empty() && standbys.is_idle() {
                continue;
            }
            let look = self.look::<B>(&database, &clock, &mut standbys, due, retention);
            tokio::select! {
                () = look => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn look<B: Batch>(
        &self,
        database: &Database,
        clock: &Clock,
        standbys: &mut Standbys,
        due: Vec<Sample>,
        retention: Option<Duration>,
    ) {
        let due = self.still_kept(due, clock, retention);
        if !due.is_empty() {
            let keys: Vec<Key> = due.iter().map(|sample| sample.key.clone()).collect();
            match self.ask_primary::<B>(database, &keys).await {
                Ok((missing, lsn)) => {
                    self.metrics.found("primary", keys.len(), &missing, &keys);
                    standbys.expect(keys, lsn);
                    self.metrics.succeeded(clock.now_us());
                }
                Err(error) => {
                    tracing::debug!(%error, "committed keys are read again later");
                    self.put_back(due);
                }
            }
        }
        standbys.ask::<B>(&self.metrics).await;
    }

    /// Leaves out what the retention may have taken meanwhile.
    fn still_kept(&self, due: Vec<Sample>, clock: &Clock, retention: Option<Duration>) -> Vec<Sample> {
        let Some(retention) = retention else { return due };
        // A partition goes when its last reading is too old; the margin covers the time until the look.
        let margin = Duration::from_secs(600).min(retention / 2);
        let kept = i64::try_from((retention - margin).as_micros()).unwrap_or(i64::MAX);
        // By the primary's clock: nothing goes before that one says so. This machine's may be wrong, and would let a row that
        // is lost pass for an old one, or the other way round.
        let oldest = clock.now_us().saturating_sub(kept);
        let all = due.len();
        let due: Vec<Sample> = due.into_iter().filter(|sample| sample.key.at_us >= oldest).collect();
        self.metrics.skipped.inc_by((all - due.len()) as u64);
        due
    }

    /// Which keys are missing, and up to where a standby must have replayed to be asked.
    async fn ask_primary<B: Batch>(
        &self,
        database: &Database,
        keys: &[Key],
    ) -> Result<(Vec<usize>, String), WriteError> {
        const LSN: &str = "SELECT pg_catalog.pg_current_wal_flush_lsn()::text";
        let patience = database.commit_timeout();
        let client = database.client().await?;
        let asked = in_time(patience, async {
            let missing = B::missing(&client, keys).await?;
            let lsn: String = client.query_one(LSN, &[]).await?.get(0);
            Ok((missing, lsn))
        })
        .await;
        give_back(database, client, &asked);
        asked
    }
}

/// A connection whose state is unknown is thrown away.
fn give_back<T>(database: &Database, client: Client, outcome: &Result<T, WriteError>) {
    if let Err(error) = outcome
        && !error.keeps_connection()
    {
        database.discard(client, &error.to_string());
    }
}
