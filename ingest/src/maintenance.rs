//! The upkeep of the tables: schema at start, then partitions, by one elected process.
//!
//! Elected by a session advisory lock: whoever holds it makes partitions ahead, builds the per-device index on those
//! whose time has passed, and drops what is older than the retention. The lock dies with its connection. Making goes its
//! own way: a partition that cannot be indexed or dropped now never keeps new ones from being made.

mod elected;
mod expiry;
mod letters;
mod quiet;
mod tables;

use std::time::Duration;

use anyhow::Context as _;
use deadpool_postgres::{Client, ClientWrapper};
use service::backoff::Backoff;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, State};
use crate::database::Database;
use crate::failure::WriteError;
use crate::metrics::Metrics;
use crate::partitions::{self, Layout};
use crate::schema::{self, Purpose};
use crate::settings::IngestSettings;
use elected::Elected;
pub use letters::Storage;

/// The bytes of "tier0ele".
const ELECTION_LOCK: i64 = 0x7469_6572_3065_6c65;

/// How many times longer than one answer the checks at the start may take before their connection is given up and they
/// begin again. A migration takes as long as it takes: begun again it would take as long again.
const PREPARE_ANSWERS: u32 = 12;
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
    pub clock: Clock,
    pub metrics: Metrics,
    /// Bring the schema up to date first.
    pub migrate: bool,
    /// Make, index and drop partitions. A process that writes no telemetry leaves them alone, since its retention may be
    /// another.
    pub partitions: bool,
}

impl Maintenance {
    /// Cancels `prepared` once there is a table to write to, then keeps the partitions and watches the tables until shutdown.
    pub async fn run(self, prepared: CancellationToken, shutdown: CancellationToken) {
        let watch = async {
            prepared.cancelled().await;
            tables::watch(&self.database, self.purpose()).await;
        };
        tokio::select! {
            () = self.keep(&prepared, &shutdown) => {}
            () = watch => {}
        }
    }

    async fn keep(&self, prepared: &CancellationToken, shutdown: &CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let outcome = tokio::select! {
                outcome = self.work(prepared, &mut backoff) => outcome,
                () = shutdown.cancelled() => return,
            };
            let wait = backoff.next(rand::random());
            match outcome {
                Ok(()) => {}
                Err(error) => {
                    self.metrics.upkeep_failures.inc();
                    // Another process may be elected now.
                    self.metrics.partitions_ahead.set(0);
                    self.metrics.partitions_overdue.set(0.0);
                    self.metrics.letters.forget();
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
            self.prepare().await?;
            prepared.cancel();
        }
        if !self.partitions {
            return std::future::pending().await;
        }
        if self.clock.look().state == State::Apart {
            // Others first: their clocks may be right.
            sleep(2 * PERIOD).await;
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
        let elected = Elected::new(client, &self.settings, self.clock.clone(), self.metrics.clone());
        backoff.reset();
        tokio::select! {
            outcome = self.make_ahead() => outcome,
            outcome = elected.tidy() => outcome,
        }
    }

    /// The schema, the clocks, and the partitions that live readings need now.
    async fn prepare(&self) -> anyhow::Result<()> {
        // Out of the pool first: whoever ends this in the middle of a statement must not leave it to a writer, nor the lock.
        let mut client = Client::take(self.database.client().await?);
        if self.migrate {
            schema::migrate(&mut client).await?;
        }
        let patience = PREPARE_ANSWERS * self.database.commit_timeout();
        timeout(patience, self.check(&mut client))
            .await
            .context("check the schema and make partitions")??;
        self.database.works();
        Ok(())
    }

    fn purpose(&self) -> Purpose {
        if self.partitions { Purpose::Telemetry } else { Purpose::Sessions }
    }

    async fn check(&self, client: &mut ClientWrapper) -> anyhow::Result<()> {
        schema::check(client, self.purpose()).await?;
        self.clock.measure(client).await?;
        self.clock.remember_stored(client).await?;
        if self.partitions {
            self.ensure_ahead(client).await?;
        }
        Ok(())
    }

    /// Makes partitions until one cannot be made.
    async fn make_ahead(&self) -> anyhow::Result<()> {
        loop {
            let mut client = self.database.client().await?;
            match timeout(UPKEEP_TIMEOUT, self.ensure_ahead(&mut client)).await {
                Ok(Ok(made)) if made > 0 => tracing::info!(made, "partitions made"),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    self.database.discard(client, "partitions not made");
                    return Err(error.into());
                }
                Err(late) => {
                    self.database.discard(client, "no answer while partitions were made");
                    return Err(late.into());
                }
            }
            drop(client);
            sleep(PERIOD).await;
        }
    }

    /// What readings and dead letters need now and until well after the next look, whichever clock is right.
    async fn ensure_ahead(&self, client: &mut tokio_postgres::Client) -> Result<usize, WriteError> {
        let telemetry = Layout::new(&self.settings);
        let letters = Layout::of_dead_letters(&self.settings);
        let mut made = 0;
        for layout in [telemetry, letters] {
            let ahead = layout.width_us.max(60_000_000);
            let cells: Vec<i64> = self
                .clock
                .possible_us()
                .into_iter()
                .flat_map(|now| layout.cells_between(now - layout.width_us, layout.window(now).1 + ahead))
                .collect();
            made += partitions::ensure(client, &layout, &layout.cells(cells.into_iter())).await?;
        }
        Ok(made)
    }
}
