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
use jiff::Timestamp;
use service::health::Dependency;
use service::secret::Secret;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use wire::mqtt::MqttSettings;

use super::connection::{Connection, Incoming, ack_id};
use super::error::ConnectionError;
use super::leave::{self, Farewell};
use super::metrics::SourceMetrics;
use super::packet::{Poison, Publish, Qos};
use super::reconnect::Reconnect;
use super::session_memory::{SessionMemory, Verdict};
use super::settings::ConsumerSettings;
use crate::LASTED;
use crate::unconnected::void_until;

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
    /// Whether the broker should have a session for us.
    pub sessions: Arc<SessionMemory>,
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
        self.run_inner(queue, shutdown, None).await;
    }

    /// As [`Source::run`], but takes only what the broker holds for this client id already, then ends its session.
    ///
    /// # Errors
    /// When the session was not ended, with the reason. Nothing is lost then: the broker keeps what is not committed.
    pub async fn leave(self, queue: Sender, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut farewell = Farewell::new(&self.settings);
        let sessions = self.sessions.clone();
        self.run_inner(queue, shutdown, Some(&mut farewell)).await;
        if farewell.has_ended_the_session() {
            sessions.ended();
        }
        farewell.outcome()
    }

    async fn run_inner(
        self,
        queue: Sender,
        shutdown: CancellationToken,
        mut farewell: Option<&mut Farewell>,
    ) {
        let mut queue = Some(queue);
        let mut reconnect = Reconnect::new();
        let mut had_rival = false;
        let mut generation: u32 = 0;
        loop {
            generation = generation.wrapping_add(1);
            let opened = tokio::select! {
                opened = Connection::open(&self.broker, &self.settings) => opened,
                () = shutdown.cancelled() => break,
            };
            let mut subscribed = None;
            let error = match opened {
                Ok(connection) => {
                    self.opened(&connection);
                    let serving = Serving {
                        connection,
                        generation,
                        queue: &mut queue,
                        farewell: farewell.as_deref_mut(),
                        marker_topic: leave::topic(&self.settings.client_id),
                        subscribed: &mut subscribed,
                        had_rival: &mut had_rival,
                        was_poisoned: false,
                        was_unanswerable: false,
                    };
                    match self.serve(serving, &shutdown).await {
                        End::Drained => return,
                        End::Failed(error) => error,
                    }
                }
                Err(error) => error,
            };
            let error = self.sessions.explain(error, &self.settings.client_id);
            had_rival |= matches!(error, ConnectionError::TakenOver(_));
            let subscribed = subscribed.map(|since: Instant| since.elapsed());
            self.sessions.closed(Timestamp::now());
            self.source_metrics.ended(&error, subscribed);
            self.health.down(error.to_string());
            if let Some(farewell) = &mut farewell {
                farewell.lost(&error);
            }
            if shutdown.is_cancelled() || farewell.as_ref().is_some_and(|farewell| farewell.has_failed()) {
                break;
            }
            let wait = reconnect.ended(&error, subscribed, rand::random());
            tracing::warn!(%error, again_in = ?wait, "no connection to the broker");
            let pause = tokio::time::timeout(wait, shutdown.cancelled()).map(drop).shared();
            // All of it: a member that leaves has no writers any more when it says goodbye once more.
            tokio::join!(self.void_until(pause.clone()), pause);
        }
        // No connection to acknowledge on: what is in the queue is still committed, and delivered again later.
        drop(queue.take());
        self.void_until(std::future::pending()).await;
    }

    /// The broker has accepted a connection: what it grants, and whether it still has the session.
    fn opened(&self, connection: &Connection) {
        let terms = connection.terms();
        let client_id = &self.settings.client_id;
        tracing::info!(session_present = terms.session_present, "connected to the broker");
        self.source_metrics
            .session_expiry
            .set(i64::try_from(terms.session_expiry.as_secs()).unwrap_or(i64::MAX));
        if terms.is_expiry_shortened {
            tracing::warn!(
                asked = ?self.settings.session_expiry,
                granted = ?terms.session_expiry,
                "the broker keeps the session of an absent consumer for a shorter time than mqtt_consumer.session_expiry: after \
                 a longer absence readings are lost. Raise the broker's limit"
            );
        }
        match self.sessions.opened(terms.session_present, Timestamp::now()) {
            Verdict::Resumed => {}
            Verdict::New => tracing::info!(client_id, "the broker has made a new session for this client id"),
            Verdict::Lost { last_seen } => {
                self.source_metrics.session_lost(Timestamp::now());
                tracing::warn!(
                    client_id,
                    %last_seen,
                    "the broker has lost the session of this client id. Readings that it acknowledged to devices since then, and \
                     before this line, may be lost: see docs/runbooks/session-lost.md"
                );
            }
        }
    }

    async fn void_until(&self, until: impl Future<Output = ()>) {
        let void = void_until(&self.settlements, until).await;
        self.source_metrics.stale_acknowledgements.inc_by(void);
    }

    async fn serve(&self, mut serving: Serving<'_>, shutdown: &CancellationToken) -> End {
        let begun = match &mut serving.farewell {
            None => serving.connection.subscribe(&self.settings.filter),
            Some(farewell) => farewell.begin(&mut serving.connection),
        };
        if let Err(error) = begun {
            return End::Failed(error);
        }
        let keep_alive = serving.connection.terms().keep_alive;
        // A broker that wants to hear of us often is not held to answer as fast.
        let patience = keep_alive.max(self.broker.connect_timeout);
        let mut ping = tokio::time::interval(keep_alive / 2);
        ping.reset();
        let mut last_heard = Instant::now();
        let mut subscribe_by = last_heard + self.broker.connect_timeout;
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
                            Ok(true) if serving.subscribed.is_none() => self.subscribed(&mut serving),
                            Ok(_) => {}
                            Err(error) => return End::Failed(error),
                        }
                        // A socket that always has more must not keep the writers from this thread.
                        tokio::task::consume_budget().await;
                    }
                    Err(error) => return End::Failed(error),
                },
                () = room_again(serving.queue.as_ref()), if serving.queue.is_some() && !room => {}
                _ = ping.tick() => {
                    if room && last_heard.elapsed() > patience {
                        return End::Failed(ConnectionError::Timeout("PINGREQ"));
                    }
                    if *serving.had_rival && serving.subscribed.is_some_and(|since| since.elapsed() >= LASTED) {
                        *serving.had_rival = false;
                        self.health.up();
                    }
                    if let Some(farewell) = &mut serving.farewell
                        && let Err(error) = farewell.remind(&mut serving.connection)
                    {
                        return End::Failed(error);
                    }
                    serving.connection.ping();
                }
                () = sleep_until(subscribe_by), if serving.subscribed.is_none() && room => {
                    if last_heard.elapsed() >= self.broker.connect_timeout {
                        return End::Failed(ConnectionError::Timeout("SUBSCRIBE"));
                    }
                    subscribe_by = last_heard + self.broker.connect_timeout;
                }
                () = shutdown.cancelled(), if serving.queue.is_some() => {
                    // The writers finish what they have; its acknowledgements still go out here.
                    drop(serving.queue.take());
                }
            }
        }
    }

    fn subscribed(&self, serving: &mut Serving<'_>) {
        *serving.subscribed = Some(Instant::now());
        self.source_metrics.connected.set(1);
        if serving.farewell.is_none() {
            self.sessions.subscribed(Timestamp::now());
            self.give_up_old_filter(serving);
        }
        // After a takeover it is not known yet who keeps the session.
        if !*serving.had_rival {
            self.health.up();
        }
    }

    /// A session keeps every subscription that it ever had. The one of a former setting is ended when the present one holds,
    /// so that no reading falls in between.
    fn give_up_old_filter(&self, serving: &mut Serving<'_>) {
        if let Some(old) = self.sessions.old_filter()
            && let Err(error) = serving.connection.unsubscribe([old])
        {
            tracing::warn!(%error, "the subscription to the former mqtt_consumer.filter stays");
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
                    chunk.push(serving.delivery(publish, received));
                }
                Ok(Some(Incoming::Poison(poison))) => {
                    if let Some(farewell) = &mut serving.farewell {
                        farewell.reading();
                    }
                    chunk.push(serving.poison(poison, received));
                }
                Ok(Some(Incoming::Unanswerable(problem))) => {
                    // Skipped, and nothing is said to the broker: it keeps the message, and delivers it again with the next
                    // connection. Ending this one would keep all behind it from ever being acknowledged.
                    self.source_metrics.unanswerable.inc();
                    if !std::mem::replace(&mut serving.was_unanswerable, true) {
                        tracing::error!(
                            problem,
                            "the broker sent a PUBLISH that cannot be acknowledged; it keeps it"
                        );
                    }
                }
                Ok(Some(other)) => {
                    confirmed |= match other {
                        Incoming::Subscribed => true,
                        Incoming::Unsubscribed(_) => serving.farewell.is_some(),
                        _ => false,
                    };
                    if let (Incoming::Unsubscribed(code), None) = (&other, &serving.farewell) {
                        self.sessions.old_filter_ended(*code);
                    }
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
            if ack.connection == serving.generation && serving.connection.acknowledge(ack.id) {
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
    /// Since when; `None` until the broker has confirmed it.
    subscribed: &'a mut Option<Instant>,
    /// The session was taken over, and no connection has lasted since.
    had_rival: &'a mut bool,
    /// A PUBLISH of this connection could not be read.
    was_poisoned: bool,
    /// One could not even be acknowledged.
    was_unanswerable: bool,
}

impl Serving<'_> {
    fn delivery(&self, publish: Publish, received: Instant) -> Delivery {
        let ack = self.ack(publish.qos, publish.packet_id);
        Delivery {
            // Topic and payload hold the whole packet, properties included.
            held: publish.size,
            ..Delivery::new(publish.topic, publish.payload, ack, received)
        }
    }

    fn poison(&mut self, poison: Poison, received: Instant) -> Delivery {
        // One line a connection; the dead letters are counted.
        if !std::mem::replace(&mut self.was_poisoned, true) {
            tracing::warn!(
                packet_id = poison.packet_id,
                problem = poison.problem,
                bytes = poison.packet.len(),
                "the broker sent a PUBLISH that cannot be read: it becomes a dead letter (malformed_packet)"
            );
        }
        let ack = self.ack(poison.qos, poison.packet_id);
        Delivery {
            held: poison.packet.len(),
            malformed: Some(poison.problem),
            ..Delivery::new(poison.topic, poison.packet, ack, received)
        }
    }

    fn ack(&self, qos: Qos, packet_id: u16) -> Option<Ack> {
        Some(Ack { connection: self.generation, id: ack_id(qos, packet_id)? })
    }

    /// A marker of a member that leaves, or that began to leave and was started again. It is no reading, so nobody waits
    /// for its acknowledgement; the order among acknowledgements matters for readings.
    fn marker(&mut self, publish: &Publish) {
        if let Some(id) = ack_id(publish.qos, publish.packet_id) {
            self.connection.acknowledge(id);
        }
        if let Some(farewell) = &mut self.farewell {
            farewell.marker(publish);
        }
    }

    /// Everything taken from the broker is settled and acknowledged.
    async fn say_goodbye(self) -> End {
        match self.farewell {
            Some(farewell) if farewell.ends_the_session() => {
                let ending = self.connection.end_session(&self.marker_topic, GOODBYE_WAIT);
                if let Err(error) = ending.await {
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
