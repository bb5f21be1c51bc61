//! The source: reads from the broker into the queue, acknowledges what is settled, reconnects for ever.
//!
//! It never waits for the database. When the queue is full it stops reading, goes on pinging and acknowledging, and
//! leaves the messages with the broker. Acknowledgements of an older connection are void: the broker delivers those
//! messages again, and their identity makes that harmless.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use ingest::delivery::{Ack, Delivery};
use ingest::metrics::Metrics;
use ingest::queue::Sender;
use ingest::settlement::{Settled, Settlements};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Publish;
use service::backoff::Backoff;
use service::health::Dependency;
use service::secret::Secret;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::mqtt::MqttSettings;

use super::connection::{Connection, ConnectionError, Incoming};
use super::leave::{self, Farewell};
use super::metrics::SourceMetrics;
use super::settings::ConsumerSettings;
use crate::unconnected::void_until;

const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const GOODBYE_WAIT: Duration = Duration::from_secs(1);

/// One per process.
#[derive(Debug)]
pub struct Source {
    pub broker: MqttSettings<Secret>,
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
    Failed(ConnectionError),
}

impl Source {
    /// Runs until shutdown and drained. Owns the queue's sending end; dropping it tells the writers to finish.
    pub async fn run(self, queue: Sender, shutdown: CancellationToken) {
        self.go(queue, shutdown, None).await;
    }

    /// As [`Source::run`], but takes only what the broker holds for this client id already, then ends its session.
    ///
    /// # Errors
    /// When the session was not ended, with the reason. Nothing is lost then: the broker keeps what is not committed.
    pub async fn leave(self, queue: Sender, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut farewell = Farewell::new(&self.settings);
        self.go(queue, shutdown, Some(&mut farewell)).await;
        farewell.outcome()
    }

    async fn go(self, queue: Sender, shutdown: CancellationToken, mut farewell: Option<&mut Farewell>) {
        let mut queue = Some(queue);
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut generation: u32 = 0;
        loop {
            generation = generation.wrapping_add(1);
            let opened = tokio::select! {
                opened = Connection::open(&self.broker, &self.settings) => opened,
                () = shutdown.cancelled() => break,
            };
            let error = match opened {
                Ok(connection) => {
                    tracing::info!(session_present = connection.session_present, "connected to the broker");
                    let serving = Serving {
                        connection,
                        generation,
                        queue: &mut queue,
                        farewell: farewell.as_deref_mut(),
                        marker_topic: leave::topic(&self.settings.client_id),
                    };
                    match self.serve(serving, &shutdown, &mut backoff).await {
                        End::Drained => return,
                        End::Failed(error) => error,
                    }
                }
                Err(error) => error,
            };
            self.source_metrics.connected.set(0);
            self.source_metrics.reconnects.inc();
            self.health.down(error.to_string());
            if let Some(farewell) = &mut farewell {
                farewell.lost(&error);
            }
            if shutdown.is_cancelled() || farewell.as_ref().is_some_and(|farewell| farewell.has_failed()) {
                break;
            }
            let wait = backoff.next(rand::random());
            tracing::warn!(%error, again_in = ?wait, "no connection to the broker");
            let pause = tokio::time::timeout(wait, shutdown.cancelled()).map(drop).shared();
            // All of it: a member that leaves has no writers any more when it says goodbye once more.
            tokio::join!(self.void_until(pause.clone()), pause);
        }
        // No connection to acknowledge on: what is in the queue is still committed, and delivered again later.
        drop(queue.take());
        self.void_until(std::future::pending()).await;
    }

    async fn void_until(&self, until: impl Future<Output = ()>) {
        let void = void_until(&self.settlements, until).await;
        self.source_metrics.stale_acknowledgements.inc_by(void);
    }

    async fn serve(
        &self,
        mut serving: Serving<'_>,
        shutdown: &CancellationToken,
        backoff: &mut Backoff,
    ) -> End {
        let begun = match &mut serving.farewell {
            None => serving.connection.subscribe(&self.settings.filter),
            Some(farewell) => farewell.begin(&mut serving.connection),
        };
        if let Err(error) = begun {
            return End::Failed(error);
        }
        let keep_alive = self.broker.keep_alive;
        let mut ping = tokio::time::interval(keep_alive / 2);
        ping.reset();
        let mut last_heard = Instant::now();
        let mut subscribed = false;
        let mut was_paused = false;
        loop {
            if serving.farewell.as_ref().is_some_and(|farewell| farewell.is_over()) {
                // The writers finish what they have, as at shutdown.
                drop(serving.queue.take());
            }
            let room = serving.queue.as_ref().is_some_and(Sender::has_room);
            if serving.queue.is_some() && !room && !was_paused {
                self.source_metrics.paused.inc();
            }
            if room && was_paused {
                // Silence while we did not listen says nothing about the broker.
                last_heard = Instant::now();
            }
            was_paused = !room;
            tokio::select! {
                settled = self.settlements.take() => match settled {
                    Some(settled) => {
                        self.acknowledge(&mut serving, &settled);
                        while let Some(more) = self.settlements.try_take() {
                            self.acknowledge(&mut serving, &more);
                        }
                    }
                    None => return serving.say_goodbye().await,
                },
                exchanged = serving.connection.exchange(room) => match exchanged {
                    Ok(false) => {}
                    Ok(true) => {
                        last_heard = Instant::now();
                        match self.read(&mut serving) {
                            Ok(confirmed) => {
                                if confirmed && !subscribed {
                                    subscribed = true;
                                    backoff.reset();
                                    self.source_metrics.connected.set(1);
                                    self.health.up();
                                }
                            }
                            Err(error) => return End::Failed(error),
                        }
                        // A socket that always has more must not keep the writers from this thread.
                        tokio::task::consume_budget().await;
                    }
                    Err(error) => return End::Failed(error),
                },
                () = room_again(serving.queue.as_ref()), if serving.queue.is_some() && !room => {}
                _ = ping.tick() => {
                    if room && last_heard.elapsed() > keep_alive {
                        return End::Failed(ConnectionError::Timeout("PINGREQ"));
                    }
                    if !subscribed && room && last_heard.elapsed() > self.broker.connect_timeout {
                        return End::Failed(ConnectionError::Timeout("SUBSCRIBE"));
                    }
                    if let Some(farewell) = &mut serving.farewell
                        && let Err(error) = farewell.remind(&mut serving.connection)
                    {
                        return End::Failed(error);
                    }
                    serving.connection.ping();
                }
                () = shutdown.cancelled(), if serving.queue.is_some() => {
                    // The writers finish what they have; its acknowledgements still go out here.
                    drop(serving.queue.take());
                }
            }
        }
    }

    /// Hands everything read so far to the writers. Returns whether the subscription was confirmed, or its end.
    fn read(&self, serving: &mut Serving<'_>) -> Result<bool, ConnectionError> {
        let received = Instant::now();
        let mut confirmed = false;
        let mut chunk = Vec::new();
        let outcome = loop {
            match serving.connection.parse() {
                Ok(Some(Incoming::Publish(publish))) if publish.topic == serving.marker_topic => {
                    serving.marker(&publish);
                }
                Ok(Some(Incoming::Publish(publish))) => {
                    if let Some(farewell) = &mut serving.farewell {
                        farewell.reading();
                    }
                    let ack = (publish.qos != QoS::AtMostOnce)
                        .then(|| Ack { connection: serving.generation, id: u64::from(publish.pkid) });
                    chunk.push(Delivery { topic: publish.topic, payload: publish.payload, ack, received });
                }
                Ok(Some(other)) => {
                    confirmed |= match other {
                        Incoming::Subscribed => true,
                        Incoming::Unsubscribed(_) => serving.farewell.is_some(),
                        _ => false,
                    };
                    if let Some(farewell) = &mut serving.farewell
                        && let Err(error) = farewell.take(&other, &mut serving.connection)
                    {
                        break Err(error);
                    }
                }
                Ok(None) => break Ok(confirmed),
                Err(error) => break Err(error),
            }
        };
        // While draining nothing is read, so there is a queue whenever there is something to put into it.
        if let (false, Some(queue)) = (chunk.is_empty(), serving.queue.as_ref())
            && !queue.send(chunk)
        {
            return Err(ConnectionError::Unexpected("end of the writers"));
        }
        outcome
    }

    fn acknowledge(&self, serving: &mut Serving<'_>, settled: &[Settled]) {
        let mut sent = 0;
        for Settled { ack, .. } in settled {
            // Packet ids are 16 bits: a larger id could only come from a bug, and is not acknowledged.
            if let (true, Ok(packet_id)) = (ack.connection == serving.generation, u16::try_from(ack.id)) {
                serving.connection.acknowledge(packet_id);
                sent += 1;
            }
        }
        self.metrics.acknowledged.inc_by(sent);
        self.source_metrics.stale_acknowledgements.inc_by(settled.len() as u64 - sent);
    }
}

/// One connection in use.
struct Serving<'a> {
    connection: Connection,
    generation: u32,
    /// `None` while draining: nothing more is read.
    queue: &'a mut Option<Sender>,
    /// When the member leaves for good.
    farewell: Option<&'a mut Farewell>,
    marker_topic: String,
}

impl Serving<'_> {
    /// A marker of a member that leaves, or that began to leave and was started again. It is no reading, so nobody waits
    /// for its acknowledgement; the order among acknowledgements matters for readings.
    fn marker(&mut self, publish: &Publish) {
        if publish.qos != QoS::AtMostOnce {
            self.connection.acknowledge(publish.pkid);
        }
        if let Some(farewell) = &mut self.farewell {
            farewell.marker(publish);
        }
    }

    /// Everything taken from the broker is settled and acknowledged.
    async fn say_goodbye(self) -> End {
        match self.farewell {
            Some(farewell) if farewell.ends_the_session() => {
                if let Err(error) = self.connection.end_session(GOODBYE_WAIT).await {
                    return End::Failed(error);
                }
                farewell.ended();
            }
            _ => self.connection.close(GOODBYE_WAIT).await,
        }
        End::Drained
    }
}

async fn room_again(queue: Option<&Sender>) {
    match queue {
        Some(queue) => queue.room().await,
        None => std::future::pending().await,
    }
}
