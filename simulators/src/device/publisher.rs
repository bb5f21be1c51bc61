//! One connection's publishing, without its socket: what to write now, what the broker's answers mean.
//!
//! Bytes out and bytes in, time as an argument. At QoS 1 a message is accepted when its PUBACK says success; a
//! PUBACK with any other reason is a refusal, "no matching subscribers" included: the broker took the message and
//! threw it away. At QoS 0 a message is accepted when its last byte went into the socket.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use prometheus::local::LocalHistogram;

use super::account::{Account, Snapshot};
use super::message::Message;
use super::metrics::Metrics;
use super::payload::Writer;
use super::protocol::{self, Answer, Limits, ProtocolError};
use super::settings::FleetSettings;
use super::window::Window;
use crate::pacing::Pacer;

/// Bytes made ahead of the socket. More would only be latency; less would cost system calls at full speed.
const AHEAD: usize = 64 << 10;
/// Unwritten QoS 0 messages; AHEAD bytes of the smallest message are fewer.
const SMALLEST_PACKET: usize = 64;

/// The two clocks of a tick.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Since the simulator's start; never goes back.
    pub since: Duration,
    /// Wall clock, microseconds since 1970.
    pub wall_us: i64,
}

/// Sums over a connection's life that are no part of the ledger.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    pub sent: u64,
    pub resent: u64,
    pub skipped: u64,
    /// When the first message was made and the last one accepted, since the simulator's start.
    pub first_sent: Option<Duration>,
    pub last_accepted: Option<Duration>,
    /// Messages that the broker did not accept, by its reason.
    pub refused: BTreeMap<&'static str, u64>,
}

/// The publishing side of one connection, over all its reconnects.
#[derive(Debug)]
pub struct Publisher {
    settings: Arc<FleetSettings>,
    account: Account,
    pacer: Pacer,
    writer: Writer,
    metrics: Metrics,
    puback_seconds: LocalHistogram,
    /// QoS 1: written, not answered.
    window: Window,
    /// QoS 0: made, not yet wholly written, with the stream position of each one's end.
    unwritten: VecDeque<(u64, Message)>,
    /// Lost with an earlier connection, to be sent before anything new.
    again: VecDeque<Message>,
    out: Vec<u8>,
    /// Bytes of `out` the socket has.
    written: usize,
    /// Stream position of the start of `out`.
    position: u64,
    topic: Vec<u8>,
    payload: Vec<u8>,
    inbox: Vec<u8>,
    limits: Limits,
    /// New messages still to make; `None`: no end.
    remaining: Option<u64>,
    stopped: bool,
    /// When the broker last said something, and since when it owes an answer to a ping.
    heard: Duration,
    pinged: Option<Duration>,
    traffic: Traffic,
}

impl Publisher {
    /// The publisher of connection `connection` of `settings.connections`.
    #[must_use]
    pub fn new(settings: Arc<FleetSettings>, connection: u32, metrics: Metrics) -> Self {
        let account = Account::new(&settings, connection);
        let connections = f64::from(settings.connections);
        // Every machine the same rate: a connection with one machine more sends that much more.
        let share = f64::from(account.devices()) / f64::from(settings.devices);
        let rate = settings.messages_per_second().map(|rate| rate * share);
        let offset = f64::from(connection) / connections;
        let remaining = settings.count.map(|count| {
            let (each, rest) =
                (count / u64::from(settings.connections), count % u64::from(settings.connections));
            each + u64::from(u64::from(connection) < rest)
        });
        Self {
            account,
            pacer: Pacer::new(rate, offset, settings.max_behind),
            writer: Writer::new(settings.seed),
            puback_seconds: metrics.puback_seconds.local(),
            metrics,
            window: Window::default(),
            unwritten: VecDeque::new(),
            again: VecDeque::new(),
            out: Vec::new(),
            written: 0,
            position: 0,
            topic: Vec::new(),
            payload: Vec::new(),
            inbox: Vec::new(),
            limits: Limits { receive_maximum: 1, packet_size: 0, qos: 0, keep_alive: None },
            remaining,
            stopped: false,
            heard: Duration::ZERO,
            pinged: None,
            traffic: Traffic::default(),
            settings,
        }
    }

    /// A new connection is up.
    pub fn connected(&mut self, limits: Limits, now: Duration) {
        self.limits = limits;
        self.heard = now;
        self.pinged = None;
    }

    /// The connection is gone: everything without an answer will be sent again, under the same identity.
    pub fn lost(&mut self) {
        let lost = self.window.drain().chain(self.unwritten.drain(..).map(|(_, message)| message));
        for message in lost {
            self.account.unanswered(&message);
            self.again.push_back(Message { uncertain: true, ..message });
            self.metrics.in_flight.dec();
        }
        self.out.clear();
        self.written = 0;
        self.inbox.clear();
    }

    /// No new messages from now on.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Adds the farewell, after which nothing may follow.
    pub fn say_goodbye(&mut self) {
        self.out.extend_from_slice(&protocol::DISCONNECT);
    }

    /// Whether `count` messages were made.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.remaining == Some(0)
    }

    /// Whether every message made was answered.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.window.span() == 0 && self.unwritten.is_empty() && self.again.is_empty() && self.out.is_empty()
    }

    /// Makes what is due, as far as the broker's window and the buffer allow. Returns how many messages.
    pub fn fill(&mut self, now: Now) -> u64 {
        self.out.drain(..self.written);
        self.position += self.written as u64;
        self.written = 0;
        let due = if self.is_closed() {
            0
        } else {
            let due = self.pacer.due(now.since);
            self.skip(due.skipped);
            due.messages
        };
        let (mut made, mut sent) = (0, 0);
        while self.has_room() {
            let message = if let Some(message) = self.again.pop_front() {
                self.traffic.resent += 1;
                self.metrics.resent.inc();
                message
            } else if made == due || self.remaining == Some(0) {
                break;
            } else {
                let repeat = self.account.due_repeat(now.since);
                let Some(message) = repeat.or_else(|| self.account.next(now.wall_us)) else { break };
                made += 1;
                self.remaining = self.remaining.map(|remaining| remaining - 1);
                message
            };
            sent += u64::from(self.send(message, now.since));
        }
        self.pacer.took(made);
        self.traffic.sent += sent;
        if sent > 0 && self.traffic.first_sent.is_none() {
            self.traffic.first_sent = Some(now.since);
        }
        self.metrics.sent.inc_by(sent);
        self.metrics.in_flight.add(i64::try_from(sent).unwrap_or(0));
        sent
    }

    fn skip(&mut self, skipped: u64) {
        if skipped > 0 {
            self.traffic.skipped += skipped;
            self.metrics.skipped.inc_by(skipped);
        }
    }

    fn is_closed(&self) -> bool {
        self.stopped || self.remaining == Some(0)
    }

    fn has_room(&self) -> bool {
        let in_flight = self.window.span().max(self.unwritten.len());
        let most = match self.settings.qos {
            0 => AHEAD / SMALLEST_PACKET,
            _ => usize::from(self.settings.max_in_flight.min(self.limits.receive_maximum).min(u16::MAX - 1)),
        };
        in_flight < most && self.out.len() < AHEAD
    }

    /// Puts the message into the buffer; false: it is larger than the broker takes.
    fn send(&mut self, mut message: Message, now: Duration) -> bool {
        self.topic.clear();
        self.payload.clear();
        message.sent_us = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        message.write(&mut self.topic, &mut self.payload, &mut self.writer, &self.settings.trouble);
        let qos = self.settings.qos;
        if protocol::publish_size(qos, &self.topic, &self.payload) > self.limits.packet_size as usize {
            self.refused(&message, "larger_than_the_broker_takes");
            return false;
        }
        let packet_id = if qos == 0 { 0 } else { self.window.push(message) };
        protocol::publish(&mut self.out, qos, packet_id, &self.topic, &self.payload);
        if qos == 0 {
            self.unwritten.push_back((self.position + self.out.len() as u64, message));
        }
        true
    }

    /// What the socket should be given next.
    #[must_use]
    pub fn to_write(&self) -> &[u8] {
        self.out.get(self.written..).unwrap_or_default()
    }

    /// The socket took `bytes` of [`Publisher::to_write`].
    pub fn wrote(&mut self, bytes: usize, now: Duration) {
        self.written += bytes;
        let end = self.position + self.written as u64;
        if self.written == self.out.len() {
            self.position = end;
            self.out.clear();
            self.written = 0;
        }
        let mut accepted = 0;
        while let Some((_, message)) = self.unwritten.pop_front_if(|(last, _)| *last <= end) {
            self.account.accept(&message, now);
            accepted += 1;
        }
        self.settle(accepted, accepted, now);
    }

    /// Takes bytes that came from the broker.
    ///
    /// # Errors
    /// When the connection cannot go on.
    pub fn read(&mut self, bytes: &[u8], now: Duration) -> Result<(), ProtocolError> {
        self.heard = now;
        self.inbox.extend_from_slice(bytes);
        let (mut at, mut accepted, mut answered) = (0, 0, 0);
        let outcome = loop {
            match protocol::answer(self.inbox.get(at..).unwrap_or_default()) {
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
                Ok(Some((answer, length))) => {
                    at += length;
                    let Answer::PubAck { packet_id, reason } = answer else {
                        self.pinged = None;
                        continue;
                    };
                    let Some(message) = self.window.take(packet_id) else {
                        break Err(ProtocolError::Unexpected(format!(
                            "PUBACK for packet {packet_id}, which is not open"
                        )));
                    };
                    answered += 1;
                    let waited = now.saturating_sub(Duration::from_micros(message.sent_us));
                    self.puback_seconds.observe(waited.as_secs_f64());
                    if reason == 0 {
                        self.account.accept(&message, now);
                        accepted += 1;
                    } else {
                        self.refused(&message, protocol::reason(reason));
                    }
                }
            }
        };
        self.inbox.drain(..at);
        self.settle(answered, accepted, now);
        self.puback_seconds.flush();
        outcome
    }

    fn settle(&mut self, answered: i64, accepted: i64, now: Duration) {
        if accepted > 0 {
            self.traffic.last_accepted = Some(now);
        }
        self.metrics.in_flight.sub(answered);
        self.metrics.acknowledged.inc_by(accepted.unsigned_abs());
    }

    fn refused(&mut self, message: &Message, reason: &'static str) {
        self.account.refuse(message);
        *self.traffic.refused.entry(reason).or_default() += 1;
        self.metrics.refused.with_label_values(&[reason]).inc();
    }

    /// Adds a ping when the broker has been silent for long.
    ///
    /// # Errors
    /// When the broker owes an answer for too long.
    pub fn check_silence(&mut self, keep_alive: Duration, now: Duration) -> Result<(), String> {
        let timeout = self.settings.answer_timeout;
        let silent = now.saturating_sub(self.heard);
        let oldest = self.window.oldest().map(|message| Duration::from_micros(message.sent_us));
        let owed = self.pinged.into_iter().chain(oldest).min();
        if let Some(owed) = owed.map(|since| now.saturating_sub(since)) {
            // An overloaded broker that still answers others in turn gets more time than a silent one.
            if owed > timeout && silent > timeout || owed > timeout * 4 {
                return Err(format!("the broker has not answered for {owed:.1?}"));
            }
        }
        let keep_alive = self.limits.keep_alive.map_or(keep_alive, |brokers| brokers.min(keep_alive));
        if silent > keep_alive / 2 && self.pinged.is_none() {
            self.pinged = Some(now);
            self.out.extend_from_slice(&protocol::PINGREQ);
        }
        Ok(())
    }

    /// How far behind its schedule the connection is.
    #[must_use]
    pub fn behind(&self, now: Duration) -> Duration {
        if self.is_closed() { Duration::ZERO } else { self.pacer.behind(now) }
    }

    /// Counts what would be due while there is no connection, so that a long outage is skipped, not caught up.
    pub fn idle(&mut self, now: Duration) {
        if !self.is_closed() && self.pacer.has_begun() {
            let due = self.pacer.due(now);
            self.skip(due.skipped);
        }
    }

    /// When there is something to do again; zero: at once.
    #[must_use]
    pub fn next(&self) -> Option<Duration> {
        if self.again.is_empty() {
            (!self.is_closed()).then(|| self.pacer.next())
        } else {
            Some(Duration::ZERO)
        }
    }

    /// Whether answers or the socket are waited for.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.window.span() > 0 || !self.out.is_empty() || self.pinged.is_some()
    }

    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// The connection's part of the ledger as of now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let under_way = self.window.iter().chain(self.unwritten.iter().map(|(_, message)| message));
        self.account.snapshot(under_way, self.again.iter())
    }
}

#[cfg(test)]
mod tests;
