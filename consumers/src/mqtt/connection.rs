//! One connection to the broker: MQTT 5 over a socket of our own.
//!
//! rumqttc's own event loop writes and flushes every acknowledgement alone, one system call each, and awaits the
//! socket while it writes. Here all acknowledgements that are due leave in one write, and nothing ever waits for
//! anything but the socket. docs/decisions/0001 has the figures. What comes in is read by [`super::packet`]; rumqttc writes
//! the rare packets that go out.
//!
//! The broker writes every message alone, and a process that waits for the socket is woken for each. So after a small
//! read the connection looks away for [`COALESCE`] and then takes what has come together: one wake for many messages.
//! docs/decisions/0007 has the figures.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::time::Duration;

use bytes::{Buf as _, BufMut, BytesMut};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    Connect, ConnectProperties, Filter, Login, Packet, PingReq, Publish as OwnPublish, RetainForwardRule,
    Subscribe, Unsubscribe,
};
use service::secret::Secret;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use wire::mqtt::MqttSettings;

use super::error::ConnectionError;
use super::greeting;
use super::packet::{self, Disconnect, Poison, Publish, Qos, SubAck};
use super::reason::{About, explain};
use super::settings::ConsumerSettings;
use super::terms::{self, Asked, Terms};

/// Read at once. Payloads are slices of these pieces and hold a piece until the last of them is committed.
const READ_BYTES: usize = 256 << 10;
/// A new piece is started when less than this is left in the old one.
const MIN_READ_BYTES: usize = 16 << 10;
/// A read of less than this is worth waiting for company: some forty messages.
const SMALL_READ_BYTES: usize = 16 << 10;
/// How long after a small read nothing is read. It adds to a reading's way; a batch waits longer for its rows.
const COALESCE: Duration = Duration::from_millis(1);

/// With so much that the broker does not take, nothing more is read: it holds the acknowledgements of four times the
/// messages that may be in flight.
const MAX_OUTGOING: usize = 1 << 20;

/// Packet ids of ours, each used once at a time.
const SUBSCRIBE_ID: u16 = 1;
const UNSUBSCRIBE_ID: u16 = 2;
const PUBLISH_ID: u16 = 3;

/// What is above the 16 bits of a packet id in the number of a message: it came at QoS 2.
const EXACTLY_ONCE: u64 = 1 << 16;

/// The number by which a message is acknowledged later; `None` at QoS 0.
#[must_use]
pub fn ack_id(qos: Qos, packet_id: u16) -> Option<u64> {
    match qos {
        Qos::AtMostOnce => None,
        Qos::AtLeastOnce => Some(packet_id.into()),
        Qos::ExactlyOnce => Some(u64::from(packet_id) | EXACTLY_ONCE),
    }
}

/// What the broker sent, as far as it is for the source. Nearly every one is a Publish, so boxing it would only add an
/// allocation per message.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "the large variant is the common one")]
pub enum Incoming {
    Publish(Publish),
    /// A message that cannot be read, but acknowledged.
    Poison(Poison),
    Subscribed,
    /// The reason of the one filter.
    Unsubscribed(u8),
    /// The answer to our own message.
    Published(u8),
    /// A message that cannot be acknowledged, and why.
    Unanswerable(&'static str),
    Pong,
}

/// A connection that has been accepted.
#[derive(Debug)]
pub struct Connection {
    /// Never blocks. Not registered with the runtime, save while something waits for it: a registered socket wakes the
    /// runtime for every packet that arrives, wanted or not.
    socket: std::net::TcpStream,
    coalesce_until: Option<Instant>,
    /// What is read goes here first; a `BytesMut` lends out only what is initialised.
    scratch: Box<[u8]>,
    incoming: BytesMut,
    outgoing: BytesMut,
    max_packet: usize,
    client_id: String,
    /// Packets of ours that wait for an answer, by packet id.
    unanswered: Unanswered,
    terms: Terms,
}

/// Which packets of ours wait for an answer.
#[derive(Debug, Default)]
struct Unanswered {
    subscribe: bool,
    unsubscribe: bool,
    publish: bool,
    pings: u32,
}

impl Connection {
    /// Connects, with the session of earlier connections if the broker still has it.
    ///
    /// # Errors
    /// [`ConnectionError`], within the connect timeout.
    pub async fn open(
        broker: &MqttSettings<Secret>,
        settings: &ConsumerSettings,
    ) -> Result<Self, ConnectionError> {
        timeout(broker.connect_timeout, Self::handshake(broker, settings))
            .await
            .map_err(|_| ConnectionError::Timeout("CONNECT"))?
    }

    async fn handshake(
        broker: &MqttSettings<Secret>,
        settings: &ConsumerSettings,
    ) -> Result<Self, ConnectionError> {
        let stream = TcpStream::connect((broker.host.as_str(), broker.port)).await?;
        stream.set_nodelay(true)?;
        let max_packet = u32::try_from(settings.max_packet.as_u64()).unwrap_or(u32::MAX);
        let asked = Asked {
            client_id: &settings.client_id,
            filter: &settings.filter,
            session_expiry: settings.session_expiry,
            keep_alive: broker.keep_alive,
        };
        let mut connection = Self {
            socket: stream.into_std()?,
            coalesce_until: None,
            scratch: vec![0; READ_BYTES].into_boxed_slice(),
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
            max_packet: usize::try_from(max_packet).unwrap_or(usize::MAX),
            client_id: settings.client_id.clone(),
            unanswered: Unanswered::default(),
            terms: Terms::of(&asked),
        };
        let properties = ConnectProperties {
            session_expiry_interval: Some(
                u32::try_from(settings.session_expiry.as_secs()).unwrap_or(u32::MAX),
            ),
            receive_maximum: Some(settings.receive_maximum),
            max_packet_size: Some(max_packet),
            ..ConnectProperties::new()
        };
        let connect = Connect {
            keep_alive: u16::try_from(broker.keep_alive.as_secs()).unwrap_or(u16::MAX),
            client_id: settings.client_id.clone(),
            clean_start: false,
            properties: Some(properties),
        };
        let login = (!broker.username.is_empty())
            .then(|| Login::new(broker.username.clone(), broker.password.expose()));
        connection.queue(&Packet::Connect(connect, None, login))?;
        connection.flush().await?;
        let answer = match connection.first_packet().await {
            // A server that does not know MQTT closes or resets.
            Err(ConnectionError::Closed) => return Err(ConnectionError::NotMqtt(greeting::CLOSED.into())),
            Err(ConnectionError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(ConnectionError::NotMqtt(greeting::CLOSED.into()));
            }
            answer => answer?,
        };
        match answer {
            packet::Incoming::ConnAck(answer) => connection.terms = terms::judge(&answer, &asked)?,
            packet::Incoming::Disconnect(reason) => return Err(connection.disconnected(&reason)),
            _ => return Err(ConnectionError::Unexpected("packet before CONNACK")),
        }
        Ok(connection)
    }

    /// What holds on this connection.
    #[must_use]
    pub fn terms(&self) -> Terms {
        self.terms
    }

    async fn first_packet(&mut self) -> Result<packet::Incoming, ConnectionError> {
        loop {
            if let Some(who) = greeting::not_mqtt(&self.incoming) {
                return Err(ConnectionError::NotMqtt(who));
            }
            if let Some(packet) = packet::parse(&mut self.incoming, self.max_packet)? {
                return Ok(packet);
            }
            self.exchange(true).await?;
        }
    }

    /// Puts a subscription into the outgoing bytes. Subscribing again changes nothing if it is there already, and repairs
    /// it if it was lost.
    ///
    /// # Errors
    /// When the filter is too long for a packet.
    pub fn subscribe(&mut self, filter: &str) -> Result<(), ConnectionError> {
        let mut filter = Filter::new(filter, QoS::AtLeastOnce);
        filter.retain_forward_rule = RetainForwardRule::OnNewSubscribe;
        let mut subscribe = Subscribe::new(filter, None);
        subscribe.pkid = SUBSCRIBE_ID;
        self.unanswered.subscribe = true;
        self.queue(&Packet::Subscribe(subscribe))
    }

    /// The opposite of [`Connection::subscribe`].
    ///
    /// # Errors
    /// As [`Connection::subscribe`].
    pub fn unsubscribe(&mut self, filters: impl Into<Vec<String>>) -> Result<(), ConnectionError> {
        self.unanswered.unsubscribe = true;
        let unsubscribe = Unsubscribe { pkid: UNSUBSCRIBE_ID, filters: filters.into(), properties: None };
        self.queue(&Packet::Unsubscribe(unsubscribe))
    }

    /// Puts a message of our own into the outgoing bytes, at QoS 1.
    ///
    /// # Errors
    /// As [`Connection::subscribe`].
    pub fn publish(&mut self, topic: &str, payload: &str) -> Result<(), ConnectionError> {
        let mut publish = OwnPublish::new(topic, QoS::AtLeastOnce, payload.to_owned(), None);
        publish.pkid = PUBLISH_ID;
        self.unanswered.publish = true;
        self.queue(&Packet::Publish(publish))
    }

    fn make_room(&mut self) {
        if self.incoming.capacity() - self.incoming.len() < MIN_READ_BYTES {
            self.incoming.reserve(READ_BYTES);
        }
    }

    /// The next packet among the bytes read so far that is for the source; `None` when more must be read.
    ///
    /// # Errors
    /// When the broker breaks the protocol or ends the connection.
    pub fn parse(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        loop {
            let incoming = match packet::parse(&mut self.incoming, self.max_packet)? {
                None => return Ok(None),
                Some(packet::Incoming::Publish(publish)) => Incoming::Publish(publish),
                Some(packet::Incoming::Poison(poison)) => Incoming::Poison(poison),
                Some(packet::Incoming::Unanswerable(problem)) => Incoming::Unanswerable(problem),
                Some(packet::Incoming::Pong) => {
                    self.unanswered.pings = self.unanswered.pings.saturating_sub(1);
                    Incoming::Pong
                }
                Some(packet::Incoming::PubRel(packet_id)) => {
                    // The message is committed: PUBREC said so. Nothing of it is kept here, so an id that is not known is
                    // answered all the same; the broker asks again for what it has not seen answered.
                    self.outgoing.put_slice(&[0x70, 2]);
                    self.outgoing.put_u16(packet_id);
                    continue;
                }
                Some(packet::Incoming::SubAck(answer)) => self.subscribed(&answer)?,
                Some(packet::Incoming::UnsubAck(answer)) => {
                    asked_for(
                        &mut self.unanswered.unsubscribe,
                        answer.packet_id == UNSUBSCRIBE_ID,
                        "UNSUBACK",
                    )?;
                    Incoming::Unsubscribed(answer.reasons.first().copied().unwrap_or(u8::MAX))
                }
                Some(packet::Incoming::PubAck(answer)) => {
                    asked_for(&mut self.unanswered.publish, answer.packet_id == PUBLISH_ID, "PUBACK")?;
                    Incoming::Published(answer.reason)
                }
                Some(packet::Incoming::Disconnect(reason)) => return Err(self.disconnected(&reason)),
                Some(packet::Incoming::ConnAck(_)) => {
                    return Err(ConnectionError::Unexpected("second CONNACK"));
                }
            };
            return Ok(Some(incoming));
        }
    }

    fn subscribed(&mut self, answer: &SubAck) -> Result<Incoming, ConnectionError> {
        asked_for(&mut self.unanswered.subscribe, answer.packet_id == SUBSCRIBE_ID, "SUBACK")?;
        match answer.reasons.first().copied().unwrap_or(u8::MAX) {
            1 => Ok(Incoming::Subscribed),
            code => {
                let words = explain(About::Subscription, code, answer.reason_string.as_deref(), None);
                Err(ConnectionError::NotSubscribed(words))
            }
        }
    }

    fn disconnected(&self, reason: &Disconnect) -> ConnectionError {
        if reason.reason == 0x8e {
            return ConnectionError::TakenOver(self.client_id.clone());
        }
        let (text, server) = (reason.reason_string.as_deref(), reason.server_reference.as_deref());
        ConnectionError::Disconnected(explain(About::Disconnect, reason.reason, text, server))
    }

    /// Puts an acknowledgement into the outgoing bytes: PUBACK, or PUBREC for a message at QoS 2, success, in its short
    /// form. `id` is of [`ack_id`]; any other acknowledges nothing, and the answer is false.
    pub fn acknowledge(&mut self, id: u64) -> bool {
        let kind = if id & EXACTLY_ONCE == 0 { 0x40 } else { 0x50 };
        let Ok(packet_id) = u16::try_from(id & !EXACTLY_ONCE) else { return false };
        self.outgoing.put_slice(&[kind, 2]);
        self.outgoing.put_u16(packet_id);
        true
    }

    pub fn ping(&mut self) {
        self.unanswered.pings += 1;
        if PingReq::write(&mut self.outgoing).is_err() {
            tracing::error!("a ping of two bytes cannot fail to be written to memory");
        }
    }

    #[must_use]
    pub fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Both directions at once: writes what is outgoing (when there is something) and, when `read`, reads. Returns
    /// whether something was read. Cancelling loses nothing.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn exchange(&mut self, read: bool) -> Result<bool, ConnectionError> {
        loop {
            if self.write()? {
                return Ok(false);
            }
            let read = read && self.outgoing.len() < MAX_OUTGOING;
            let resting = self.coalesce_until.filter(|until| *until > Instant::now());
            if read && resting.is_none() && self.read()? {
                return Ok(true);
            }
            let interest = match (read && resting.is_none(), self.has_outgoing()) {
                (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
                (true, false) => Some(Interest::READABLE),
                (false, true) => Some(Interest::WRITABLE),
                (false, false) => None,
            };
            tokio::select! {
                () = sleep_until(resting.unwrap_or_else(Instant::now)), if read && resting.is_some() => {}
                ready = readiness(&self.socket, interest), if interest.is_some() => ready?,
                else => std::future::pending().await,
            }
        }
    }

    /// Whether something was written.
    fn write(&mut self) -> Result<bool, ConnectionError> {
        if !self.has_outgoing() {
            return Ok(false);
        }
        match attempt(|| (&self.socket).write(&self.outgoing))? {
            Some(0) => Err(ConnectionError::Closed),
            Some(count) => {
                self.outgoing.advance(count);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Whether something was read.
    fn read(&mut self) -> Result<bool, ConnectionError> {
        self.make_room();
        let room = (self.incoming.capacity() - self.incoming.len()).min(self.scratch.len());
        let Some(scratch) = self.scratch.get_mut(..room) else { return Ok(false) };
        let Some(count) = attempt(|| (&self.socket).read(scratch))? else { return Ok(false) };
        if count == 0 {
            return Err(ConnectionError::Closed);
        }
        self.incoming.extend_from_slice(scratch.get(..count).unwrap_or_default());
        self.coalesce_until = (count < SMALL_READ_BYTES).then(|| Instant::now() + COALESCE);
        Ok(true)
    }

    /// Says goodbye; the broker keeps the session.
    pub async fn close(mut self, patience: Duration) {
        // DISCONNECT, reason "normal": two bytes.
        self.outgoing.put_slice(&[0xe0, 0]);
        let goodbye = async {
            self.flush().await?;
            Ok::<_, ConnectionError>(self.socket.shutdown(Shutdown::Write)?)
        };
        match timeout(patience, goodbye).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "goodbye not sent"),
            Err(_) => tracing::debug!("goodbye not sent in time"),
        }
    }

    /// Says goodbye and asks the broker to end the session. Returns when the broker has closed the connection, which it
    /// does after it has. Messages on `marker_topic` are no readings.
    ///
    /// # Errors
    /// [`ConnectionError::StillDealt`] when a reading comes before that; the session is kept then. Others when the end is
    /// not seen in time; the session may still be there.
    pub async fn end_session(
        mut self,
        marker_topic: &str,
        patience: Duration,
    ) -> Result<(), ConnectionError> {
        let goodbye = async {
            // What the broker has dealt by now comes before its answer.
            self.ping();
            while self.unanswered.pings > 0 {
                match self.parse()? {
                    None => drop(self.exchange(true).await?),
                    Some(Incoming::Publish(publish)) if publish.topic == marker_topic => {}
                    Some(Incoming::Publish(_) | Incoming::Poison(_)) => {
                        return Err(ConnectionError::StillDealt);
                    }
                    Some(_) => {}
                }
            }
            // DISCONNECT, reason "normal", session expiry interval 0.
            self.outgoing.put_slice(&[0xe0, 7, 0, 5, 0x11, 0, 0, 0, 0]);
            self.flush().await?;
            loop {
                self.incoming.clear();
                match self.exchange(true).await {
                    Ok(_) => {}
                    Err(ConnectionError::Closed) => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
        };
        timeout(patience, goodbye).await.map_err(|_| ConnectionError::Timeout("DISCONNECT"))?
    }

    fn queue(&mut self, packet: &Packet) -> Result<(), ConnectionError> {
        if packet.size() > self.terms.max_outgoing {
            return Err(ConnectionError::Unusable(format!(
                "it takes packets of at most {} bytes, and this consumer must send one of {}",
                self.terms.max_outgoing,
                packet.size()
            )));
        }
        packet.write(&mut self.outgoing, None)?;
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), ConnectionError> {
        while self.has_outgoing() {
            self.exchange(false).await?;
        }
        Ok(())
    }
}

/// An answer must be to a packet of ours that waits for one.
fn asked_for(waits: &mut bool, is_its_id: bool, answer: &'static str) -> Result<(), ConnectionError> {
    if std::mem::take(waits) && is_its_id { Ok(()) } else { Err(ConnectionError::Unexpected(answer)) }
}

/// What a socket that never blocks did; `None`: nothing now.
fn attempt(mut io: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match io() {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits until the socket may be ready.
async fn readiness(socket: &std::net::TcpStream, interest: Option<Interest>) -> io::Result<()> {
    let Some(interest) = interest else { return Ok(()) };
    // A handle of its own, whose end is the end of the registration.
    let registered = TcpStream::from_std(socket.try_clone()?)?;
    registered.ready(interest).await?;
    Ok(())
}

#[cfg(test)]
mod tests;
