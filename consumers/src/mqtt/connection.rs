//! One connection to the broker: rumqttc's MQTT 5 packets over a socket of our own.
//!
//! rumqttc's own event loop writes and flushes every acknowledgement alone, one system call each, and awaits the
//! socket while it writes. Here all acknowledgements that are due leave in one write, and nothing ever waits for
//! anything but the socket. docs/decisions/0001 has the figures.
//!
//! The broker writes every message alone, and a process that waits for the socket is woken for each. So after a small
//! read the connection looks away for [`REST`] and then takes what has come together: one wake for many messages.
//! docs/decisions/0007 has the figures.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::time::Duration;

use bytes::{Buf as _, BufMut, BytesMut};
use rumqttc::v5::mqttbytes::v5::{
    Connect, ConnectProperties, ConnectReturnCode, DisconnectReasonCode, Filter, Login, Packet, PingReq,
    PubAckReason, Publish, RetainForwardRule, Subscribe, SubscribeReasonCode, UnsubAckReason, Unsubscribe,
};
use rumqttc::v5::mqttbytes::{self, QoS};
use service::secret::Secret;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use wire::mqtt::MqttSettings;

use super::settings::ConsumerSettings;

/// Read at once. Payloads are slices of these pieces and hold a piece until the last of them is committed.
const READ_BYTES: usize = 256 << 10;
/// A new piece is started when less than this is left in the old one.
const MIN_READ_BYTES: usize = 16 << 10;
/// A read of less than this is worth waiting for company: some forty messages.
const SMALL_READ_BYTES: usize = 16 << 10;
/// How long after a small read nothing is read. It adds to a reading's way; a batch waits longer for its rows.
const REST: Duration = Duration::from_millis(1);

/// Packet ids of ours, each used once at a time.
const SUBSCRIBE_ID: u16 = 1;
const UNSUBSCRIBE_ID: u16 = 2;
const PUBLISH_ID: u16 = 3;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the broker closed the connection")]
    Closed,
    #[error("no answer to {0} in time")]
    Timeout(&'static str),
    #[error("the broker refuses the connection: {0:?}")]
    Refused(ConnectReturnCode),
    #[error("the broker refuses the subscription: {0:?}")]
    NotSubscribed(Vec<SubscribeReasonCode>),
    #[error("another process uses this client id")]
    TakenOver,
    #[error("the broker says goodbye: {0}")]
    Goodbye(String),
    #[error("protocol: {0}")]
    Protocol(#[from] mqttbytes::Error),
    #[error("protocol: unexpected {0}")]
    Unexpected(&'static str),
}

/// What the broker sent. Nearly every one is a Publish, so boxing it would only add an allocation per message.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "the large variant is the common one")]
pub enum Incoming {
    Publish(Publish),
    Subscribed,
    /// One reason for each filter.
    Unsubscribed(Vec<UnsubAckReason>),
    /// The answer to our own message.
    Published(PubAckReason),
    Pong,
}

/// A connection that has been accepted.
#[derive(Debug)]
pub struct Connection {
    /// Never blocks. Not registered with the runtime, save while something waits for it: a registered socket wakes the
    /// runtime for every packet that arrives, wanted or not.
    socket: std::net::TcpStream,
    rest_until: Option<Instant>,
    /// What is read goes here first; a `BytesMut` lends out only what is initialised.
    scratch: Box<[u8]>,
    incoming: BytesMut,
    outgoing: BytesMut,
    max_packet: u32,
    /// Whether the broker had kept a session for us.
    pub session_present: bool,
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
        let mut connection = Self {
            socket: stream.into_std()?,
            rest_until: None,
            scratch: vec![0; READ_BYTES].into_boxed_slice(),
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
            max_packet,
            session_present: false,
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
        match connection.packet().await? {
            Packet::ConnAck(answer) if answer.code == ConnectReturnCode::Success => {
                connection.session_present = answer.session_present;
            }
            Packet::ConnAck(answer) => return Err(ConnectionError::Refused(answer.code)),
            _ => return Err(ConnectionError::Unexpected("packet before CONNACK")),
        }
        Ok(connection)
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
        self.queue(&Packet::Subscribe(subscribe))
    }

    /// The opposite of [`Connection::subscribe`].
    ///
    /// # Errors
    /// As [`Connection::subscribe`].
    pub fn unsubscribe(&mut self, filters: impl Into<Vec<String>>) -> Result<(), ConnectionError> {
        let unsubscribe = Unsubscribe { pkid: UNSUBSCRIBE_ID, filters: filters.into(), properties: None };
        self.queue(&Packet::Unsubscribe(unsubscribe))
    }

    /// Puts a message of our own into the outgoing bytes, at QoS 1.
    ///
    /// # Errors
    /// As [`Connection::subscribe`].
    pub fn publish(&mut self, topic: &str, payload: &str) -> Result<(), ConnectionError> {
        let mut publish = Publish::new(topic, QoS::AtLeastOnce, payload.to_owned(), None);
        publish.pkid = PUBLISH_ID;
        self.queue(&Packet::Publish(publish))
    }

    fn make_room(&mut self) {
        if self.incoming.capacity() - self.incoming.len() < MIN_READ_BYTES {
            self.incoming.reserve(READ_BYTES);
        }
    }

    /// The next packet among the bytes read so far; `None` when more must be read.
    ///
    /// # Errors
    /// When the broker breaks the protocol or ends the connection.
    pub fn parse(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        let packet = match Packet::read(&mut self.incoming, Some(self.max_packet)) {
            Ok(packet) => packet,
            Err(mqttbytes::Error::InsufficientBytes(more)) => {
                // What this packet lacks and no more: `make_room` starts the pieces. Asking for more here started a new
                // one after each read, and a message of 450 bytes occupied 3 KB.
                self.incoming.reserve(more);
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        match packet {
            Packet::Publish(publish) => Ok(Some(Incoming::Publish(publish))),
            Packet::PingResp(_) => Ok(Some(Incoming::Pong)),
            Packet::SubAck(answer) => {
                let granted = |code: &SubscribeReasonCode| {
                    matches!(code, SubscribeReasonCode::Success(QoS::AtLeastOnce))
                };
                if answer.return_codes.iter().all(granted) {
                    Ok(Some(Incoming::Subscribed))
                } else {
                    Err(ConnectionError::NotSubscribed(answer.return_codes))
                }
            }
            Packet::UnsubAck(answer) => Ok(Some(Incoming::Unsubscribed(answer.reasons))),
            Packet::PubAck(answer) => Ok(Some(Incoming::Published(answer.reason))),
            Packet::Disconnect(reason) if reason.reason_code == DisconnectReasonCode::SessionTakenOver => {
                Err(ConnectionError::TakenOver)
            }
            Packet::Disconnect(reason) => {
                let text = reason.properties.and_then(|properties| properties.reason_string);
                Err(ConnectionError::Goodbye(text.unwrap_or_else(|| format!("{:?}", reason.reason_code))))
            }
            _ => Err(ConnectionError::Unexpected("packet")),
        }
    }

    /// Puts an acknowledgement into the outgoing bytes: PUBACK, success, in its short form.
    pub fn acknowledge(&mut self, packet_id: u16) {
        self.outgoing.put_slice(&[0x40, 2]);
        self.outgoing.put_u16(packet_id);
    }

    pub fn ping(&mut self) {
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
            let resting = self.rest_until.filter(|until| *until > Instant::now());
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
        self.rest_until = (count < SMALL_READ_BYTES).then(|| Instant::now() + REST);
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
    /// does after it has.
    ///
    /// # Errors
    /// When that is not seen in time; the session may still be there.
    pub async fn end_session(mut self, patience: Duration) -> Result<(), ConnectionError> {
        // DISCONNECT, reason "normal", session expiry interval 0.
        self.outgoing.put_slice(&[0xe0, 7, 0, 5, 0x11, 0, 0, 0, 0]);
        let goodbye = async {
            self.flush().await?;
            loop {
                // What still comes is nobody's any more.
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
        packet.write(&mut self.outgoing, None)?;
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), ConnectionError> {
        while self.has_outgoing() {
            self.exchange(false).await?;
        }
        Ok(())
    }

    async fn packet(&mut self) -> Result<Packet, ConnectionError> {
        loop {
            match Packet::read(&mut self.incoming, Some(self.max_packet)) {
                Ok(packet) => return Ok(packet),
                Err(mqttbytes::Error::InsufficientBytes(_)) => {
                    self.exchange(true).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
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
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    /// Pieces of the socket live as long as one of their messages waits, so they must be full of messages.
    #[tokio::test]
    async fn messages_that_come_one_by_one_share_a_piece() {
        const CONNACK: [u8; 5] = [0x20, 3, 0, 0, 0];
        const SUBACK: [u8; 6] = [0x90, 4, 0, 1, 0, 1];
        // Several pieces of READ_BYTES, not the first one alone.
        const MESSAGES: usize = 2_500;
        // PUBLISH at QoS 0: 404 bytes follow, the topic "t", no properties, 400 bytes of payload.
        let mut message = vec![0x30, 0x94, 0x03, 0, 1, b't', 0];
        message.resize(message.len() + 400, b'x');
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let broker = MqttSettings::<Secret> {
            host: "127.0.0.1".into(),
            port: listener.local_addr().unwrap().port(),
            ..MqttSettings::default()
        };
        let settings = ConsumerSettings::default();
        let accepted = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&CONNACK).await.unwrap();
            stream.write_all(&SUBACK).await.unwrap();
            stream
        };
        let (connection, mut stream) = tokio::join!(Connection::open(&broker, &settings), accepted);
        let mut connection = connection.unwrap();
        let mut held = Vec::new();
        while held.len() < MESSAGES {
            stream.write_all(&message).await.unwrap();
            let wanted = held.len() + 1;
            while held.len() < wanted {
                match connection.parse().unwrap() {
                    Some(Incoming::Publish(publish)) => held.push(publish.payload),
                    Some(_) => {}
                    None => {
                        timeout(Duration::from_secs(10), connection.exchange(true)).await.unwrap().unwrap();
                    }
                }
            }
        }
        let apart =
            |pair: &[bytes::Bytes]| pair[1].as_ptr() as usize != pair[0].as_ptr() as usize + message.len();
        let pieces = 1 + held.windows(2).filter(|pair| apart(pair)).count();
        assert!(pieces <= 6, "{pieces} pieces hold {MESSAGES} messages of {} bytes", message.len());
    }
}
