//! The upkeep of the tables: schema at start, then partitions, by one elected process.
//!
//! Elected by a session advisory lock: whoever holds it makes partitions ahead, builds the per-device index on those
//! whose time has passed, and drops those older than the retention. The lock dies with its connection.

use std::time::Duration;

use deadpool_postgres::{Client, ClientWrapper};
use service::backoff::Backoff;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::database::Database;
use crate::failure::WriteError;
use crate::metrics::Metrics;
use crate::partitions::{self, Layout};
use crate::schema;
use crate::settings::IngestSettings;

/// The bytes of "tier0ele".
const ELECTION_LOCK: i64 = 0x7469_6572_3065_6c65;

/// How long schema work may take before its connection is given up and it starts again.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(120);
/// An index of one partition is built within this, or tried again.
const UPKEEP_TIMEOUT: Duration = Duration::from_secs(600);
/// Between two looks at the partitions: how long a partition whose time has passed waits for its index. Far shorter than
/// the time partitions are made ahead.
const PERIOD: Duration = Duration::from_secs(2);

/// One per consumer process.
#[derive(Debug)]
pub struct Maintenance {
    pub database: Database,
    pub settings: IngestSettings,
    pub metrics: Metrics,
    /// Bring the schema up to date first.
    pub migrate: bool,
    /// Make, index and drop the partitions of telemetry. A process that writes none leaves them alone, since its
    /// retention may be another.
    pub partitions: bool,
}

impl Maintenance {
    /// Cancels `prepared` once there is a table to write to, then keeps the partitions until shutdown.
    pub async fn run(self, prepared: CancellationToken, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let outcome = tokio::select! {
                outcome = self.work(&prepared, &mut backoff) => outcome,
                () = shutdown.cancelled() => return,
            };
            let wait = backoff.next(rand::random());
            match outcome {
                Ok(()) => {}
                Err(error) => {
                    self.metrics.upkeep_failures.inc();
                    // Another process may be elected now.
                    self.metrics.partitions_ahead.set(0);
                    tracing::warn!(error = format!("{error:#}"), again_in = ?wait, "upkeep of the tables failed");
                }
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Prepares when that is not done yet, then does the upkeep for as long as it is elected.
    async fn work(&self, prepared: &CancellationToken, backoff: &mut Backoff) -> anyhow::Result<()> {
        if !prepared.is_cancelled() {
            timeout(PREPARE_TIMEOUT, self.prepare()).await??;
            prepared.cancel();
        }
        if !self.partitions {
            return std::future::pending().await;
        }
        // Out of the pool before the lock is asked for: an answer that comes too late must not leave it on a connection
        // that a writer gets.
        let client = Client::take(self.database.client().await?);
        let elected = "SELECT pg_try_advisory_lock($1)";
        let row =
            timeout(self.database.commit_timeout(), client.query_one(elected, &[&ELECTION_LOCK])).await??;
        if !row.get::<_, bool>(0) {
            drop(client);
            backoff.reset();
            sleep(PERIOD).await;
            return Ok(());
        }
        tracing::info!("elected to keep the partitions");
        let mut elected = Elected { client, layout: Layout::new(&self.settings) };
        loop {
            let ahead = timeout(UPKEEP_TIMEOUT, elected.upkeep()).await??;
            self.metrics.partitions_ahead.set(i64::try_from(ahead).unwrap_or(i64::MAX));
            self.metrics.upkeep_succeeded.set(jiff::Timestamp::now().as_millisecond() as f64 / 1e3);
            backoff.reset();
            sleep(PERIOD).await;
        }
    }

    /// The schema and the partitions that live readings need now.
    async fn prepare(&self) -> anyhow::Result<()> {
        let mut client = Client::take(self.database.client().await?);
        if self.migrate {
            schema::migrate(&mut client).await?;
        }
        if self.partitions {
            let now = jiff::Timestamp::now().as_microsecond();
            ensure_ahead(&mut client, &Layout::new(&self.settings), now).await?;
        }
        self.database.works();
        Ok(())
    }
}

/// What live readings need now and until well after the next look.
async fn ensure_ahead(
    client: &mut tokio_postgres::Client,
    layout: &Layout,
    now_us: i64,
) -> Result<usize, WriteError> {
    let ahead = layout.width_us.max(60_000_000);
    let cells = layout.cells_between(now_us - layout.width_us, layout.window(now_us).1 + ahead);
    partitions::ensure(client, layout, &cells).await
}

struct Elected {
    /// Taken out of the pool: it holds the election lock, which closing it releases.
    client: ClientWrapper,
    layout: Layout,
}

impl Elected {
    /// Returns how many partitions are ahead of the clock.
    async fn upkeep(&mut self) -> Result<usize, WriteError> {
        let now = jiff::Timestamp::now().as_microsecond();
        let (oldest, _) = self.layout.window(now);
        partitions::finish_drops(&self.client).await?;
        let made = ensure_ahead(&mut self.client, &self.layout, now).await?;
        if made > 0 {
            tracing::info!(made, "partitions made");
        }
        // The newest first: they are asked for most.
        let list = partitions::list(&self.client).await?;
        for partition in list.iter().rev() {
            if partition.span.1 <= oldest {
                partitions::drop_expired(&self.client, partition).await?;
                tracing::info!(partition = partition.name, "partition dropped: older than the retention");
            } else if partition.span.1 <= now && !partition.indexed {
                partitions::index_device(&self.client, partition).await?;
                tracing::debug!(partition = partition.name, "per-device index built");
            }
        }
        Ok(list.iter().filter(|partition| partition.span.0 > now).count())
    }
}
