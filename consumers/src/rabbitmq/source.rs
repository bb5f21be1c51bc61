//! The source: hands deliveries to the writers, acknowledges what is settled, reconnects for ever.
//!
//! It never waits for the database. When the queue is full it hands nothing on; the connection then takes only as much as its
//! own bounds allow, and the rest stays with the broker. One acknowledgement covers all that is settled: batches may commit out of
//! order, settlements come in receipt order. Acknowledgements of an older connection are void: the broker delivers
//! those messages again, and merging makes that harmless.
//!
//! Poison is acknowledged like everything else, never rejected: a queue without a dead-letter exchange would drop it, and its
//! row in `dead_letters` is committed anyway.
//!
//! Messages go back to the queue (nack, requeue) only when that helps somebody: when the database stays away for
//! `requeue_after`, and those not yet handed to the writers when the process ends.

use std::sync::Arc;
use std::time::Duration;

use amqp::{AmqpError, Broker};
use anyhow::bail;
use futures_util::FutureExt;
use ingest::metrics::Metrics;
use ingest::queue::{Capacity, Sender};
use ingest::settlement::{Refused, Settled, Settlements};
use service::backoff::Backoff;
use service::health::Dependency;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::metrics::SourceMetrics;
use super::poison::Poison;
use super::report::Report;
use super::settings::ConsumerSettings;
use super::window::Window;
use crate::LASTED;
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
        let mut report = Report::new(self.broker.clone(), self.source_metrics.clone());
        let bytes = self.settings.prefetch_bytes.as_u64();
        loop {
            generation = generation.wrapping_add(1);
            let window = Window::new(self.settings.prefetch, bytes);
            let opened = tokio::select! {
                opened = Connection::open(&self.broker, window, bytes, generation) => opened,
                () = shutdown.cancelled() => break,
            };
            let error = match opened {
                Ok((connection, declared)) => {
                    report.opened(&declared);
                    tracing::info!(queue = self.broker.queue, prefetch = self.settings.prefetch, "consuming");
                    let since = Instant::now();
                    self.source_metrics.connected.set(1);
                    self.health.up();
                    let end = self.serve(connection, generation, &mut queue, &mut poison, &shutdown).await;
                    self.source_metrics.connected.set(0);
                    let lasted = since.elapsed() >= LASTED;
                    if lasted {
                        backoff.reset();
                    }
                    match end {
                        End::Drained => return Ok(()),
                        End::Failed(AmqpError::Settings(problem)) => bail!(problem),
                        End::Failed(error) => {
                            if !lasted {
                                self.source_metrics.ended_early.inc();
                            }
                            error
                        }
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
    async fn until_emptied(&self, level: &Capacity, shutdown: &CancellationToken) {
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
        let mut closings = 0;
        let mut was_full = false;
        loop {
            if let Some(queue) = queue.as_ref() {
                while connection.has_backlog() && queue.has_room() {
                    if !queue.send(connection.chunk()) {
                        return End::Failed(AmqpError::Retry("the writers have ended".into()));
                    }
                }
            }
            let full = connection.has_backlog();
            if full && !was_full {
                self.source_metrics.paused.inc();
            }
            was_full = full;
            tokio::select! {
                settled = self.settlements.take() => match settled {
                    Some(mut settled) => {
                        while let Some(more) = self.settlements.try_take() {
                            settled.extend(more);
                        }
                        if let Err(error) = self.settle(&mut connection, generation, poison, &settled).await {
                            return End::Failed(error);
                        }
                    }
                    None => {
                        connection.close(GOODBYE_WAIT).await;
                        return End::Drained;
                    }
                },
                filled = connection.fill(), if queue.is_some() => if let Err(error) = filled {
                    return End::Failed(error);
                },
                () = room_again(queue.as_ref()), if full => {}
                _ = watch.tick() => {
                    if !connection.is_up() {
                        return End::Failed(AmqpError::Retry("the connection to the broker has ended".into()));
                    }
                    connection.gate().trickle();
                    self.source_metrics.window.set(connection.window().into());
                    self.source_metrics.redelivered.inc_by(connection.redelivered());
                    let now = connection.gate().closings();
                    self.source_metrics.held_back.inc_by(now - closings);
                    closings = now;
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

    /// Passes copies of poison on, then acknowledges everything settled at once.
    async fn settle(
        &self,
        connection: &mut Connection,
        generation: u32,
        poison: &mut Poison,
        settled: &[Settled],
    ) -> Result<(), AmqpError> {
        let ours = settled.iter().filter(|settled| settled.ack.connection == generation);
        let sent = ours.clone().count() as u64;
        self.source_metrics.stale_acknowledgements.inc_by(settled.len() as u64 - sent);
        let letters: Vec<&Refused> = ours.clone().filter_map(|settled| settled.rejected.as_deref()).collect();
        if !letters.is_empty() {
            // The client is emptied meanwhile: what it holds is larger there than on the wire.
            let published = connection.meanwhile(poison.publish(&letters)).await;
            let table_only = letters.len() as u64 - published;
            self.source_metrics.dead_lettered.with_label_values(&["published"]).inc_by(published);
            self.source_metrics.dead_lettered.with_label_values(&["table_only"]).inc_by(table_only);
        }
        if let Some(last) = ours.map(|settled| settled.ack.id).max() {
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
