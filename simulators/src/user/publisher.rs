//! Publishes what users do and keeps every message until the broker has confirmed it.
//!
//! A message without a confirm is published again, on the next connection if need be: the consumer merges, so a repetition
//! changes nothing. A broker that takes no messages (memory or disk alarm) is waited for.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::{Duration, Instant};

use amqp::AmqpError;
use anyhow::Context;
use futures_util::FutureExt;
use futures_util::future::join_all;
use jiff::Timestamp;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};
use tokio_util::sync::CancellationToken;
use wire::sessions::SessionLedger;

use super::books::Books;
use super::life::World;
use super::message::{Message, Writer};
use super::metrics::Metrics;
use super::settings::UserSimulatorSettings;
use super::trouble::Trouble;
use crate::ledger_file;
use crate::pacing::Pacer;

/// Published at once; lapin answers each when its frames are written.
const CHUNK: usize = 64;
/// A message published out of order comes after so many later ones.
const HELD_BACK: u64 = 50;
/// A broker that confirms nothing for so long, without saying that it is blocked, is connected to again.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Between two looks at the connection while nothing else happens.
const WATCH: Duration = Duration::from_millis(500);
const PERSISTENT: u8 = 2;

/// A message on its way.
#[derive(Debug)]
struct Outgoing {
    message: Message,
    /// An equal one was published before.
    repeat: bool,
    sent: Instant,
}

/// How serving a connection ended.
#[derive(Debug)]
pub enum End {
    /// Everything that was asked for is confirmed, or the time for confirms is over.
    Done,
    Failed(AmqpError),
}

/// The users and everything published and not confirmed.
#[derive(Debug)]
pub struct Publisher {
    settings: UserSimulatorSettings,
    metrics: Metrics,
    world: World,
    writer: Writer,
    pacer: Pacer,
    started: Instant,
    /// Messages made.
    made: u64,
    /// Held back until so many are made, by trouble `out_of_order` and `duplicate`.
    held: VecDeque<(u64, Outgoing)>,
    /// To be published again.
    again: VecDeque<Outgoing>,
    books: Books,
    /// When the broker last refused to take messages.
    unblocked: Instant,
    next_ledger: Instant,
    started_us: i64,
}

impl Publisher {
    #[must_use]
    pub fn new(settings: UserSimulatorSettings, metrics: Metrics) -> Self {
        let users = &settings.user_simulator;
        let world = World::new(users.seed, users.users);
        let writer = Writer::new(users.seed, users.users);
        let pacer = Pacer::new(users.messages_per_second(), 0.0, users.max_behind);
        Self {
            settings,
            metrics,
            world,
            writer,
            pacer,
            started: Instant::now(),
            made: 0,
            held: VecDeque::new(),
            again: VecDeque::new(),
            books: Books::default(),
            unblocked: Instant::now(),
            next_ledger: Instant::now(),
            started_us: Timestamp::now().as_microsecond(),
        }
    }

    /// Messages published and not confirmed, between two connections.
    #[must_use]
    pub fn unconfirmed(&self) -> u64 {
        self.again.len() as u64
    }

    /// What is confirmed so far, between two connections.
    #[must_use]
    pub fn ledger(&self, complete: bool) -> SessionLedger {
        self.ledger_with(complete, &VecDeque::new())
    }

    fn ledger_with(
        &self,
        complete: bool,
        confirms: &VecDeque<(Outgoing, PublisherConfirm)>,
    ) -> SessionLedger {
        let times = (self.started_us, Timestamp::now().as_microsecond());
        let outstanding = confirms.iter().map(|(outgoing, _)| outgoing).chain(&self.again);
        let outstanding = outstanding.map(|outgoing| &outgoing.message);
        self.books.ledger((self.settings.user_simulator.seed, complete), times, outstanding)
    }

    /// In mid-run, so that a killed simulator leaves a recent ledger.
    async fn write_ledger(&mut self, confirms: &VecDeque<(Outgoing, PublisherConfirm)>) {
        let users = &self.settings.user_simulator;
        self.next_ledger = Instant::now() + users.ledger_every;
        let Some(path) = users.ledger.clone() else { return };
        let ledger = self.ledger_with(false, confirms);
        let written = tokio::task::spawn_blocking(move || ledger_file::replace(&path, &ledger)).await;
        // A full disk now need not be one at the end; the run goes on.
        if let Err(error) = written.context("write the ledger").flatten() {
            tracing::error!(error = format!("{error:#}"), "the ledger was not written");
        }
    }

    /// Publishes until `ending` is cancelled (then only what is outstanding) and all is confirmed, or `deadline` after
    /// that has passed.
    pub async fn serve(
        &mut self,
        connection: &Connection,
        ending: &CancellationToken,
        grace: Duration,
    ) -> End {
        let channel = match confirming(connection).await {
            Ok(channel) => channel,
            Err(error) => return End::Failed(error),
        };
        let mut confirms: VecDeque<(Outgoing, PublisherConfirm)> = VecDeque::new();
        let outcome = self.publish(connection, &channel, &mut confirms, ending, grace).await;
        // What has no answer is published again, before anything new.
        for (outgoing, _) in confirms.into_iter().rev() {
            self.metrics.resent.inc();
            self.again.push_front(outgoing);
        }
        self.metrics.in_flight.set(0);
        match outcome {
            Ok(()) => End::Done,
            Err(error) => End::Failed(error),
        }
    }

    async fn publish(
        &mut self,
        connection: &Connection,
        channel: &Channel,
        confirms: &mut VecDeque<(Outgoing, PublisherConfirm)>,
        ending: &CancellationToken,
        grace: Duration,
    ) -> Result<(), AmqpError> {
        let mut deadline = None;
        loop {
            self.settle(confirms, |confirm| confirm.now_or_never())?;
            let over = ending.is_cancelled() || self.is_finished();
            if over {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + grace);
                let nothing_left = confirms.is_empty() && self.again.is_empty() && self.held.is_empty();
                if nothing_left || Instant::now() > deadline {
                    return Ok(());
                }
            }
            if Instant::now() >= self.next_ledger {
                self.write_ledger(confirms).await;
            }
            let blocked = connection.status().blocked();
            self.metrics.blocked.set(blocked.into());
            if !connection.status().connected() || !channel.status().connected() {
                return Err(AmqpError::Retry("the connection to the broker has ended".into()));
            }
            // What was sent before an alarm is confirmed after it, not at the moment at which it ends.
            if blocked {
                self.unblocked = Instant::now();
            }
            let oldest = confirms.front().map(|(outgoing, _)| outgoing.sent.max(self.unblocked).elapsed());
            if oldest.is_some_and(|oldest| oldest > ANSWER_WAIT) {
                return Err(AmqpError::Retry(format!("no confirm within {ANSWER_WAIT:?}")));
            }
            let room = self.settings.user_simulator.max_in_flight.saturating_sub(confirms.len());
            let chunk = if blocked { Vec::new() } else { self.next(room.min(CHUNK), over) };
            if chunk.is_empty() {
                self.wait(confirms, ending, room > 0 && !blocked).await?;
                continue;
            }
            self.send((connection, channel), chunk, confirms, ending).await?;
        }
    }

    /// Waits for the first confirm, or until more is due.
    async fn wait(
        &mut self,
        confirms: &mut VecDeque<(Outgoing, PublisherConfirm)>,
        ending: &CancellationToken,
        may_publish: bool,
    ) -> Result<(), AmqpError> {
        let due = self.pacer.next().saturating_sub(self.started.elapsed());
        let pause = if may_publish && !ending.is_cancelled() {
            due.clamp(self.settings.user_simulator.tick, WATCH)
        } else {
            WATCH
        };
        let first = async {
            match confirms.front_mut() {
                Some((_, confirm)) => confirm.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            answer = first => {
                let mut answer = Some(answer);
                self.settle(confirms, |confirm| answer.take().or_else(|| confirm.now_or_never()))
            }
            () = tokio::time::sleep(pause) => Ok(()),
            () = ending.cancelled(), if !ending.is_cancelled() => Ok(()),
        }
    }

    /// Takes the answers that are there, oldest first.
    fn settle(
        &mut self,
        confirms: &mut VecDeque<(Outgoing, PublisherConfirm)>,
        mut answer: impl FnMut(&mut PublisherConfirm) -> Option<lapin::Result<Confirmation>>,
    ) -> Result<(), AmqpError> {
        while let Some((_, confirm)) = confirms.front_mut() {
            let Some(answer) = answer(confirm) else { break };
            let confirmed = matches!(answer?, Confirmation::Ack(None));
            let Some((outgoing, _)) = confirms.pop_front() else { break };
            if confirmed {
                self.metrics.confirmed.inc();
                self.metrics.confirm_seconds.observe(outgoing.sent.elapsed().as_secs_f64());
                self.books.confirm(&outgoing.message, outgoing.repeat);
            } else {
                // Refused, or returned because there is no such queue.
                self.metrics.refused.inc();
                self.again.push_back(outgoing);
            }
        }
        self.metrics.in_flight.set(i64::try_from(confirms.len()).unwrap_or(i64::MAX));
        Ok(())
    }

    /// What is to be published now, at most `room`.
    fn next(&mut self, room: usize, ending: bool) -> Vec<Outgoing> {
        let mut chunk = Vec::new();
        while chunk.len() < room {
            let due = |at: u64| ending || at <= self.made;
            if let Some(outgoing) = self.again.pop_front() {
                chunk.push(outgoing);
            } else if self.held.front().is_some_and(|(at, _)| due(*at)) {
                chunk.extend(self.held.pop_front().map(|(_, outgoing)| outgoing));
            } else if !ending && self.may_make() {
                chunk.extend(self.make());
            } else {
                break;
            }
        }
        chunk
    }

    /// Whether a new message is due, within `count`.
    fn may_make(&mut self) -> bool {
        let due = self.pacer.due(self.started.elapsed());
        self.metrics.skipped.inc_by(due.skipped);
        due.messages > 0 && !self.is_finished()
    }

    /// All messages that were asked for are made.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.settings.user_simulator.count.is_some_and(|count| self.made >= count)
    }

    /// The next message; `None` when it is held back.
    fn make(&mut self) -> Option<Outgoing> {
        let number = self.made;
        self.made += 1;
        self.pacer.took(1);
        let users = &self.settings.user_simulator;
        let trouble = users.trouble.draw(users.seed, number);
        let step = self.world.step();
        let now_us = Timestamp::now().as_microsecond();
        let message = self.writer.write(&self.world, &step, number, now_us, trouble);
        let outgoing = Outgoing { message, repeat: false, sent: Instant::now() };
        match trouble {
            Trouble::OutOfOrder => {
                self.held.push_back((number + HELD_BACK, outgoing));
                None
            }
            Trouble::Duplicate => {
                let message = outgoing.message.clone();
                self.held.push_back((number + HELD_BACK, Outgoing { message, repeat: true, ..outgoing }));
                Some(outgoing)
            }
            _ => Some(outgoing),
        }
    }

    async fn send(
        &mut self,
        (connection, channel): (&Connection, &Channel),
        chunk: Vec<Outgoing>,
        confirms: &mut VecDeque<(Outgoing, PublisherConfirm)>,
        ending: &CancellationToken,
    ) -> Result<(), AmqpError> {
        let outcomes = {
            let queue = &self.settings.rabbitmq.queue;
            let published = chunk.iter().map(|outgoing| {
                let properties = BasicProperties::default()
                    .with_delivery_mode(PERSISTENT)
                    .with_content_type("application/json".into());
                let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
                let payload = &outgoing.message.payload;
                channel.basic_publish("".into(), queue.as_str().into(), options, payload, properties)
            });
            // Polled in this order, and each takes its place among the frames when it is first polled.
            let mut published = pin!(join_all(published));
            let mut since = Instant::now();
            loop {
                match tokio::time::timeout(WATCH, &mut published).await {
                    Ok(outcomes) => break Some(outcomes),
                    // An alarm that came in the middle of it: the frames wait in the client and go out when it is over.
                    Err(_)
                        if connection.status().blocked() && !ending.is_cancelled() && !self.is_finished() =>
                    {
                        self.metrics.blocked.set(1);
                        since = Instant::now();
                        self.unblocked = since;
                    }
                    Err(_) if since.elapsed() < ANSWER_WAIT => {}
                    Err(_) => break None,
                }
            }
        };
        let Some(outcomes) = outcomes else {
            self.again.extend(chunk);
            return Err(AmqpError::Retry(format!("the broker took nothing for {ANSWER_WAIT:?}")));
        };
        let mut failure = None;
        for (outgoing, outcome) in chunk.into_iter().zip(outcomes) {
            match outcome {
                Ok(confirm) => {
                    self.metrics.sent.inc();
                    confirms.push_back((Outgoing { sent: Instant::now(), ..outgoing }, confirm));
                }
                Err(error) => {
                    self.again.push_back(outgoing);
                    failure = Some(error);
                }
            }
        }
        failure.map_or(Ok(()), |error| Err(error.into()))
    }
}

async fn confirming(connection: &Connection) -> Result<Channel, AmqpError> {
    let channel = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok::<_, lapin::Error>(channel)
    };
    match tokio::time::timeout(ANSWER_WAIT, channel).await {
        Ok(channel) => Ok(channel?),
        Err(_) => Err(AmqpError::Retry("the broker opens no channel".into())),
    }
}
