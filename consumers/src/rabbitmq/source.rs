//! The source: hands deliveries to the writers, acknowledges what is settled, reconnects for ever.
//!
//! It never waits for the database. When the queue is full it stops reading and leaves the messages with the broker, whose
//! window (prefetch) bounds what it sends. One acknowledgement covers all that is settled: batches may commit out of
//! order, settlements come in receipt order. Acknowledgements of an older connection are void: the broker delivers
//! those messages again, and merging makes that harmless.
//!
//! Messages go back to the queue (nack, requeue) only when that helps somebody: when the database stays away for
//! `requeue_after`, and those not yet handed to the writers when the process ends.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use amqp::{AmqpError, Broker};
use anyhow::bail;
use futures_util::FutureExt;
use ingest::metrics::Metrics;
use ingest::queue::{Level, Sender};
use ingest::settlement::{Refused, Settled, Settlements};
use service::backoff::Backoff;
use service::health::Dependency;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::metrics::SourceMetrics;
use super::poison::Poison;
use super::settings::ConsumerSettings;
use crate::unconnected::void_until;

const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const GOODBYE_WAIT: Duration = Duration::from_secs(1);
/// Between two looks at the connection and at how long messages have waited.
const WATCH_PERIOD: Duration = Duration::from_secs(1);

/// One per process.
#[derive(Debug)]
pub struct Source {
    pub broker: Broker,
    pub settings: ConsumerSettings,
    pub settlements: Arc<Settlements>,
    pub health: Dependency,
    pub metrics: Metrics,
    pub source_metrics: SourceMetrics,
}

/// How serving a connection ended.
enum End {
    /// Shutdown was asked for and everything taken from the broker is settled and acknowledged.
    Drained,
    Failed(AmqpError),
    /// The database was away for too long; everything is back in the queue.
    Requeued,
}

impl Source {
    /// Runs until shutdown and drained. Owns the queue's sending end; dropping it tells the writers to finish.
    ///
    /// # Errors
    /// When the broker's queue does not fit the settings: trying again would not help.
    pub async fn run(self, queue: Sender, shutdown: CancellationToken) -> anyhow::Result<()> {
        let level = queue.level();
        let mut queue = Some(queue);
        let mut poison = Poison::new(self.broker.clone());
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut generation: u32 = 0;
        loop {
            generation = generation.wrapping_add(1);
            let opened = tokio::select! {
                opened = Connection::open(&self.broker, self.settings.prefetch, generation) => opened,
                () = shutdown.cancelled() => break,
            };
            let error = match opened {
                Ok(connection) => {
                    tracing::info!(queue = self.broker.queue, prefetch = self.settings.prefetch, "consuming");
                    backoff.reset();
                    self.source_metrics.connected.set(1);
                    self.health.up();
                    let end = self.serve(connection, generation, &mut queue, &mut poison, &shutdown).await;
                    self.source_metrics.connected.set(0);
                    match end {
                        End::Drained => return Ok(()),
                        End::Failed(error) => error,
                        End::Requeued => {
                            self.source_metrics.requeued.inc();
                            tracing::warn!(
                                "the database is away: messages are back in the queue until it returns"
                            );
                            self.until_emptied(&level, &shutdown).await;
                            continue;
                        }
                    }
                }
                Err(AmqpError::Settings(problem)) => bail!(problem),
                Err(error) => error,
            };
            self.source_metrics.reconnects.inc();
            self.health.down(error.to_string());
            if shutdown.is_cancelled() {
                break;
            }
            let wait = backoff.next(rand::random());
            tracing::warn!(%error, again_in = ?wait, "no connection to the broker");
            self.void_until(timeout(wait, shutdown.cancelled()).map(drop)).await;
            // What was taken from the old connection comes again on the new one. Taking it again and again while the
            // database is away would fill the queue with copies, and count against a broker's delivery limit.
            self.until_emptied(&level, &shutdown).await;
        }
        // No connection to acknowledge on: what is in the queue is still committed, and delivered again later.
        drop(queue.take());
        self.void_until(std::future::pending()).await;
        Ok(())
    }

    /// Without a connection, until the writers have committed everything they have, or shutdown.
    async fn until_emptied(&self, level: &Level, shutdown: &CancellationToken) {
        let until = async {
            tokio::select! {
                () = level.emptied() => {}
                () = shutdown.cancelled() => {}
            }
        };
        self.void_until(until).await;
    }

    async fn void_until(&self, until: impl Future<Output = ()>) {
        let void = void_until(&self.settlements, until).await;
        self.source_metrics.stale_acknowledgements.inc_by(void);
    }

    async fn serve(
        &self,
        mut connection: Connection,
        generation: u32,
        queue: &mut Option<Sender>,
        poison: &mut Poison,
        shutdown: &CancellationToken,
    ) -> End {
        let mut watch = tokio::time::interval(WATCH_PERIOD);
        let mut was_paused = false;
        loop {
            let room = queue.as_ref().is_some_and(Sender::has_room);
            if queue.is_some() && !room && !was_paused {
                self.source_metrics.paused.inc();
            }
            was_paused = !room;
            tokio::select! {
                settled = self.settlements.take() => match settled {
                    Some(mut settled) => {
                        while let Some(more) = self.settlements.try_take() {
                            settled.extend(more);
                        }
                        if let Err(error) = self.settle(&connection, generation, poison, &settled).await {
                            return End::Failed(error);
                        }
                    }
                    None => {
                        connection.close(GOODBYE_WAIT).await;
                        return End::Drained;
                    }
                },
                chunk = connection.deliveries(), if room => match (chunk, queue.as_ref()) {
                    (Ok(chunk), Some(queue)) => {
                        if !queue.send(chunk) {
                            return End::Failed(AmqpError::Retry("the writers have ended".into()));
                        }
                    }
                    (Ok(_), None) => {}
                    (Err(error), _) => return End::Failed(error),
                },
                () = room_again(queue.as_ref()), if queue.is_some() && !room => {}
                _ = watch.tick() => {
                    if !connection.is_up() {
                        return End::Failed(AmqpError::Retry("the connection to the broker has ended".into()));
                    }
                    if queue.is_some() && self.settlements.oldest() > self.settings.requeue_after {
                        return match connection.requeue_all().await {
                            Ok(()) => {
                                connection.close(GOODBYE_WAIT).await;
                                End::Requeued
                            }
                            Err(error) => End::Failed(error),
                        };
                    }
                }
                () = shutdown.cancelled(), if queue.is_some() => {
                    // The writers finish what they have; its acknowledgements still go out here.
                    drop(queue.take());
                    if let Err(error) = connection.stop().await {
                        return End::Failed(error);
                    }
                }
            }
        }
    }

    /// Passes poison on, then acknowledges everything settled at once.
    async fn settle(
        &self,
        connection: &Connection,
        generation: u32,
        poison: &mut Poison,
        settled: &[Settled],
    ) -> Result<(), AmqpError> {
        let ours = settled.iter().filter(|settled| settled.ack.connection == generation);
        let sent = ours.clone().count() as u64;
        self.source_metrics.stale_acknowledgements.inc_by(settled.len() as u64 - sent);
        let refused: Vec<(u64, &Refused)> =
            ours.clone().filter_map(|settled| Some((settled.ack.id, settled.rejected.as_deref()?))).collect();
        let mut rejected = HashSet::new();
        if !refused.is_empty() {
            let letters: Vec<&Refused> = refused.iter().map(|(_, letter)| *letter).collect();
            let confirmed = poison.publish(&letters).await;
            for ((tag, _), published) in refused.into_iter().zip(confirmed) {
                if !published {
                    connection.reject(tag).await?;
                    rejected.insert(tag);
                }
                let way = if published { "published" } else { "rejected" };
                self.source_metrics.dead_lettered.with_label_values(&[way]).inc();
            }
        }
        // A tag that was rejected is unknown to the broker from then on: acknowledging it would close the channel.
        if let Some(last) = ours.map(|settled| settled.ack.id).filter(|tag| !rejected.contains(tag)).max() {
            connection.acknowledge(last).await?;
        }
        self.metrics.acknowledged.inc_by(sent);
        Ok(())
    }
}

async fn room_again(queue: Option<&Sender>) {
    match queue {
        Some(queue) => queue.room().await,
        None => std::future::pending().await,
    }
}
