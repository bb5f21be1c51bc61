//! What the elected process does beside making partitions: indexes, drops, and the bounds of `dead_letters`.

use std::time::Duration;

use anyhow::Context;
use deadpool_postgres::ClientWrapper;
use tokio::time::{Instant, sleep, timeout};

use super::expiry::{self, Believed};
use super::quiet::Quiet;
use super::{PERIOD, UPKEEP_TIMEOUT, letters};
use crate::clock::{Clock, State};
use crate::failure::WriteError;
use crate::metrics::Metrics;
use crate::partitions::{self, Layout, Listing, Partition, Table};
use crate::settings::IngestSettings;

/// Longest wait for a lock. Whoever holds a partition for longer delays its end, nothing else.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '10s'";
/// Between two tries of what failed: an index that is built again and again would cost more than it brings.
const AGAIN: Duration = Duration::from_secs(60);
/// So long the clocks may be apart before another process may be elected, whose clock is perhaps right.
const APART: Duration = Duration::from_secs(30);
/// Between two looks at what is written to each partition.
const QUIET_PERIOD: Duration = Duration::from_secs(5);
/// Between two looks for old reports of web sites.
const REPORTS_PERIOD: Duration = Duration::from_secs(60);

/// Holds the election.
pub(super) struct Elected {
    /// Taken out of the pool: it holds the election lock, which closing it releases.
    client: ClientWrapper,
    clock: Clock,
    metrics: Metrics,
    telemetry: Layout,
    letters: Layout,
    settings: IngestSettings,
    /// Not before these times.
    index_again: Instant,
    drop_again: Instant,
    reports_again: Instant,
    /// Of `device_telemetry` and of `dead_letters`.
    quiet: [Quiet; 2],
    quiet_again: Instant,
    /// A day of letters that should have made room could not be dropped.
    letters_stuck: bool,
    /// When the clocks last agreed.
    agreed: Instant,
}

impl Elected {
    pub(super) fn new(
        client: ClientWrapper,
        settings: &IngestSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let now = Instant::now();
        Self {
            client,
            clock,
            metrics,
            telemetry: Layout::new(settings),
            letters: Layout::of_dead_letters(settings),
            settings: settings.clone(),
            index_again: now,
            drop_again: now,
            reports_again: now,
            quiet: Default::default(),
            quiet_again: now,
            letters_stuck: false,
            agreed: now,
        }
    }

    /// Until the connection is lost, or this process had better not be the elected one.
    pub(super) async fn tidy(mut self) -> anyhow::Result<()> {
        self.client.batch_execute(LOCK_TIMEOUT).await.context("set the lock timeout")?;
        loop {
            let good = timeout(UPKEEP_TIMEOUT, self.look()).await.context("a look at the partitions")??;
            anyhow::ensure!(!self.client.is_closed(), "the connection that holds the election is lost");
            if good {
                self.metrics.upkeep_succeeded.set(self.clock.now_us() as f64 / 1e6);
            }
            if self.clock.look().state != State::Apart {
                self.agreed = Instant::now();
            } else if self.agreed.elapsed() >= APART {
                tracing::warn!("the clocks are apart: another process may keep the partitions");
                return Ok(());
            }
            sleep(PERIOD).await;
        }
    }

    /// Whether all went well. Errors are those of looking; what cannot be done to one partition is said and tried again.
    async fn look(&mut self) -> Result<bool, WriteError> {
        let telemetry = partitions::list(&self.client, Table::DeviceTelemetry).await?;
        let look = self.clock.look();
        let now_us = self.clock.now_us();
        let ahead = telemetry.partitions.iter().filter(|partition| partition.span.0 > now_us).count();
        self.metrics.partitions_ahead.set(i64::try_from(ahead).unwrap_or(i64::MAX));
        let mut good = true;
        // Decided before anything is dropped: whoever reads a day for hours must not lift the bound of the others.
        let bounded = self.bound_letters(now_us).await;
        good &= self.noted(bounded, "what is stored of dead letters cannot be decided");
        if Instant::now() >= self.quiet_again {
            self.quiet_again = Instant::now() + QUIET_PERIOD;
            let [of_telemetry, of_letters] = &mut self.quiet;
            of_telemetry.look(&self.client, &telemetry).await?;
            let days = partitions::list(&self.client, Table::DeadLetters).await?;
            of_letters.look(&self.client, &days).await?;
        }
        if let Some(believed) = Believed::of(&look) {
            let overdue = expiry::overdue(&self.telemetry, &telemetry, &believed);
            self.metrics.partitions_overdue.set(overdue.as_secs_f64());
        }
        if Instant::now() >= self.drop_again {
            let excess_dropped = self.drop_excess_letters(now_us).await;
            self.letters_stuck =
                !self.noted(excess_dropped, "dead letters that take too much room cannot be dropped now");
            let old_dropped = self.drop_old(&telemetry).await;
            let old_dropped = self.noted(old_dropped, "a partition cannot be dropped now");
            if self.letters_stuck || !old_dropped {
                good = false;
                self.drop_again = Instant::now() + AGAIN;
            }
        }
        if Instant::now() >= self.index_again {
            // By the slower clock: an index on a partition that is still written to costs every reading.
            let indexed = self.index(&telemetry, now_us.min(look.own_us)).await;
            if !self.noted(indexed, "an index cannot be built now") {
                good = false;
                self.index_again = Instant::now() + AGAIN;
            }
        }
        if Instant::now() >= self.reports_again {
            self.reports_again = Instant::now() + REPORTS_PERIOD;
            let deleted = self.delete_reports().await;
            good &= self.noted(deleted, "old reports of web sites cannot be deleted now");
        }
        Ok(good)
    }

    /// The newest partition first: it is asked for most.
    async fn index(&self, telemetry: &Listing, now_us: i64) -> Result<(), WriteError> {
        for partition in telemetry.partitions.iter().rev() {
            if partition.span.1 <= now_us && !partition.indexed {
                partitions::index_device(&self.client, partition).await?;
                tracing::debug!(partition = partition.name, "per-device index built");
            }
        }
        Ok(())
    }

    async fn drop_old(&self, telemetry: &Listing) -> Result<(), WriteError> {
        // While nobody knows the time nothing is old.
        let believed = Believed::of(&self.clock.look());
        for (layout, quiet) in [self.telemetry, self.letters].iter().zip(&self.quiet) {
            let listing = match layout.table {
                Table::DeviceTelemetry => telemetry.clone(),
                Table::DeadLetters => partitions::list(&self.client, Table::DeadLetters).await?,
            };
            let expired = match &believed {
                Some(believed) => expiry::expired(&self.client, layout, &listing, believed, quiet).await?,
                None => Vec::new(),
            };
            let spared = listing.partitions.iter().filter(|partition| !expired.contains(partition));
            partitions::clear_marks(&self.client, spared).await?;
            if believed.is_some() {
                self.finish_drops(layout.table).await?;
            }
            for partition in expired {
                self.drop_one(layout.table, partition, listing.default.as_deref(), "retention").await?;
            }
        }
        Ok(())
    }

    async fn finish_drops(&self, table: Table) -> Result<(), WriteError> {
        let drops = partitions::finish_drops(&self.client, table).await?;
        for name in drops.dropped {
            tracing::warn!(table = name, "a partition that was detached and not dropped is dropped now");
        }
        for name in drops.kept {
            tracing::warn!(
                table = name,
                "a partition that somebody else was detaching is detached now, and kept"
            );
        }
        Ok(())
    }

    async fn drop_one(
        &self,
        table: Table,
        partition: &Partition,
        default: Option<&str>,
        cause: &'static str,
    ) -> Result<(), WriteError> {
        let letters = match table {
            Table::DeadLetters => letters::count(&self.client, partition).await?,
            Table::DeviceTelemetry => 0,
        };
        partitions::drop_expired(&self.client, table, partition, default).await?;
        match cause {
            "retention" => {
                tracing::info!(partition = partition.name, "partition dropped: older than the retention")
            }
            _ => tracing::warn!(
                partition = partition.name,
                letters,
                "dead letters dropped before their time: the table had reached ingest.dead_letter_max_bytes"
            ),
        }
        self.metrics.letters.dropped.with_label_values(&[cause]).inc_by(letters);
        Ok(())
    }

    /// Measures `dead_letters` and says how much of a letter is stored.
    async fn bound_letters(&self, now_us: i64) -> Result<(), WriteError> {
        let listing = partitions::list(&self.client, Table::DeadLetters).await?;
        let sizes = letters::measure(&self.client, now_us, &listing).await?;
        let max = self.settings.dead_letter_max_bytes.as_u64();
        let stuck = if self.letters_stuck { sizes.total() } else { 0 };
        let storage = letters::decide(sizes.open, stuck, max);
        if letters::apply(&self.client, storage).await? {
            tracing::warn!(
                bytes = sizes.open,
                stuck,
                max,
                letters = storage.letters,
                payloads = storage.payloads,
                "how much of a dead letter is stored has changed, by what the table takes already"
            );
        }
        self.metrics.letters.set(sizes.total(), sizes.rows, max, storage);
        Ok(())
    }

    /// Drops the oldest days of letters while the table is too large.
    async fn drop_excess_letters(&self, now_us: i64) -> Result<(), WriteError> {
        let listing = partitions::list(&self.client, Table::DeadLetters).await?;
        let sizes = letters::measure(&self.client, now_us, &listing).await?;
        for partition in sizes.excess(self.settings.dead_letter_max_bytes.as_u64()) {
            self.drop_one(Table::DeadLetters, &partition, listing.default.as_deref(), "size").await?;
        }
        Ok(())
    }

    async fn delete_reports(&self) -> Result<(), WriteError> {
        let Some(believed) = Believed::of(&self.clock.look()) else { return Ok(()) };
        let retention_us = partitions::micros(self.settings.site_activity_retention);
        let deleted = expiry::delete_reports(&self.client, &believed, retention_us).await?;
        if deleted > 0 {
            tracing::debug!(deleted, "old reports of web sites deleted");
        }
        Ok(())
    }

    /// Says and counts an error; whether there was none.
    fn noted(&self, outcome: Result<(), WriteError>, what: &'static str) -> bool {
        let Err(error) = outcome else { return true };
        self.metrics.upkeep_failures.inc();
        tracing::warn!(%error, what, "part of the upkeep failed; tried again");
        false
    }
}
