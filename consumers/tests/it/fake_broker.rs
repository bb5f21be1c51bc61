//! A broker that does what a test's script says and nothing else, and the source under test with the test as its writer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use bytesize::ByteSize;
use consumers::mqtt::metrics::SourceMetrics;
use consumers::mqtt::session_memory::SessionMemory;
use consumers::mqtt::settings::ConsumerSettings;
use consumers::mqtt::source::Source;
use ingest::delivery::{Ack, Delivery};
use ingest::metrics::Metrics;
use ingest::queue::{self, Receiver};
use ingest::settlement::{Settled, Settlements};
use rumqttc::v5::mqttbytes::v5::{Connect, Packet, PingResp, Publish};
use rumqttc::v5::mqttbytes::{Error, QoS};
use service::health::Health;
use service::metrics::Registry;
use service::secret::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use wire::mqtt::MqttSettings;

/// For everything that must happen.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Listens on a port of its own.
pub(crate) struct FakeBroker {
    listener: TcpListener,
}

impl FakeBroker {
    pub(crate) async fn new() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    /// How to reach it, with pings every second.
    pub(crate) fn settings(&self) -> MqttSettings<Secret> {
        MqttSettings {
            host: "127.0.0.1".into(),
            port: self.listener.local_addr().unwrap().port(),
            keep_alive: Duration::from_secs(2),
            ..MqttSettings::default()
        }
    }

    /// The next connection; nothing is answered yet.
    pub(crate) async fn accept(&self) -> Session {
        let (stream, _) = timeout(SOON, self.listener.accept()).await.expect("the source connects").unwrap();
        Session { stream, incoming: BytesMut::new() }
    }

    /// The next connection, accepted; the subscription is not answered yet.
    pub(crate) async fn connected(&self) -> Session {
        let mut session = self.accept().await;
        session.connect().await;
        session.send(&[0x20, 3, 0, 0, 0]).await;
        assert!(matches!(session.next().await, Some(Packet::Subscribe(_))));
        session
    }

    /// The next connection, accepted and subscribed.
    pub(crate) async fn subscribed(&self) -> Session {
        let mut session = self.connected().await;
        session.grant(1).await;
        session
    }
}

/// One connection, the broker's end.
pub(crate) struct Session {
    stream: TcpStream,
    incoming: BytesMut,
}

impl Session {
    /// The next packet, pings answered and returned too. `None` when the other side has closed or said goodbye.
    pub(crate) async fn next(&mut self) -> Option<Packet> {
        loop {
            match Packet::read(&mut self.incoming, None) {
                Ok(Packet::PingReq(ping)) => {
                    let mut answer = BytesMut::new();
                    PingResp::write(&mut answer).unwrap();
                    self.send(&answer).await;
                    return Some(Packet::PingReq(ping));
                }
                Ok(packet) => return Some(packet),
                // DISCONNECT without a reason, which the codec does not read.
                Err(Error::PayloadRequired) => return None,
                Err(Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("the source sent what is no packet: {error}"),
            }
            let read = self.stream.read_buf(&mut self.incoming);
            match timeout(SOON, read).await.expect("something from the source") {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// The next packet that is no ping; those are answered.
    pub(crate) async fn not_a_ping(&mut self) -> Option<Packet> {
        loop {
            match self.next().await {
                Some(Packet::PingReq(_)) => {}
                other => return other,
            }
        }
    }

    pub(crate) async fn connect(&mut self) -> Connect {
        match self.next().await {
            Some(Packet::Connect(connect, ..)) => connect,
            other => panic!("CONNECT expected, not {other:?}"),
        }
    }

    /// Exactly these bytes come next; pings, answered, may come before them. For what the codec above cannot read.
    pub(crate) async fn bytes(&mut self, expected: &[u8]) {
        loop {
            if self.incoming.starts_with(&[0xc0, 0]) {
                self.incoming.advance(2);
                self.send(&[0xd0, 0]).await;
            } else if self.incoming.len() >= expected.len() {
                assert_eq!(self.incoming.split_to(expected.len()), expected);
                return;
            }
            let read = self.stream.read_buf(&mut self.incoming);
            let count = timeout(SOON, read).await.expect("something from the source").unwrap();
            assert!(count > 0, "the source has closed: {:x?}", self.incoming);
        }
    }

    /// The next acknowledgement; pings, and markers of a member that leaves, may come before it.
    pub(crate) async fn puback(&mut self) -> u16 {
        loop {
            match self.next().await {
                Some(Packet::PubAck(ack)) => return ack.pkid,
                Some(Packet::PingReq(_) | Packet::Publish(_)) => {}
                other => panic!("PUBACK expected, not {other:?}"),
            }
        }
    }

    pub(crate) async fn pubacks(&mut self, count: usize) -> Vec<u16> {
        let mut ids = Vec::new();
        while ids.len() < count {
            ids.push(self.puback().await);
        }
        ids
    }

    /// What the source sends leaves in order: with a ping as the very next packet, nothing else was sent before it.
    pub(crate) async fn nothing_but_a_ping(&mut self) {
        let next = self.next().await;
        assert!(matches!(next, Some(Packet::PingReq(_))), "a ping expected, not {next:?}");
    }

    /// Waits until the source has ended the connection.
    pub(crate) async fn ended(mut self) {
        while let Some(packet) = self.next().await {
            assert!(matches!(packet, Packet::PingReq(_)), "nothing more expected, not {packet:?}");
        }
    }

    /// A member that leaves: CONNECT is answered; the filters it no longer wants.
    pub(crate) async fn unsubscribing(&mut self, session_present: bool) -> Vec<String> {
        self.connect().await;
        self.send(&[0x20, 3, u8::from(session_present), 0, 0]).await;
        match self.next().await {
            Some(Packet::Unsubscribe(unsubscribe)) => unsubscribe.filters,
            other => panic!("UNSUBSCRIBE expected, not {other:?}"),
        }
    }

    /// UNSUBACK with this code, then what follows: the topic listened to and the message published there.
    pub(crate) async fn marker(&mut self, code: u8) -> Publish {
        self.send(&[0xb0, 4, 0, 2, 0, code]).await;
        let Some(Packet::Subscribe(subscribe)) = self.next().await else { panic!("SUBSCRIBE expected") };
        self.grant(1).await;
        let Some(Packet::Publish(marker)) = self.next().await else { panic!("PUBLISH expected") };
        assert_eq!(
            (marker.qos, marker.topic.as_ref()),
            (QoS::AtLeastOnce, subscribe.filters[0].path.as_bytes())
        );
        let id = marker.pkid.to_be_bytes();
        self.send(&[0x40, 2, id[0], id[1]]).await;
        marker
    }

    /// SUBACK with this code.
    pub(crate) async fn grant(&mut self, code: u8) {
        self.send(&[0x90, 4, 0, 1, 0, code]).await;
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        timeout(SOON, self.stream.write_all(bytes)).await.expect("the source reads").unwrap();
    }

    /// Messages with these packet ids, at QoS 1, in one write.
    pub(crate) async fn publish(&mut self, ids: impl IntoIterator<Item = u16>) {
        let mut bytes = BytesMut::new();
        for id in ids {
            bytes.put(message(id));
        }
        self.send(&bytes).await;
    }
}

fn consumer() -> ConsumerSettings {
    ConsumerSettings { max_packet: ByteSize::kib(1), ..ConsumerSettings::default() }
}

/// A message whose payload is its packet id.
pub(crate) fn message(id: u16) -> BytesMut {
    let mut publish = Publish::new("og/field/S/T/D", QoS::AtLeastOnce, id.to_string(), None);
    publish.pkid = id;
    let mut bytes = BytesMut::new();
    publish.write(&mut bytes).unwrap();
    bytes
}

/// A message the test has taken as a writer would: a batch of one.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) text: String,
    pub(crate) malformed: Option<&'static str>,
    ticket: u64,
    bytes: usize,
    ack: Ack,
}

/// The source between a fake broker and the test.
pub(crate) struct Rig {
    pub(crate) broker: FakeBroker,
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
    pub(crate) source_metrics: SourceMetrics,
    pub(crate) sessions: Arc<SessionMemory>,
    pub(crate) shutdown: CancellationToken,
    settlements: Arc<Settlements>,
    receiver: Receiver<()>,
    waiting: VecDeque<Delivery>,
    next_ticket: u64,
    task: JoinSet<anyhow::Result<()>>,
}

impl Rig {
    pub(crate) async fn new() -> Self {
        Self::with(100, |_| {}).await
    }

    /// With other settings of the consumer.
    pub(crate) async fn set(change: impl FnOnce(&mut ConsumerSettings)) -> Self {
        let mut settings = consumer();
        change(&mut settings);
        Self::start(10_000, false, |_| {}, settings).await
    }

    /// A member that leaves for good.
    pub(crate) async fn leaving() -> Self {
        Self::start(100, true, |_| {}, consumer()).await
    }

    /// With a queue of `max_messages`.
    pub(crate) async fn with(max_messages: usize, change: impl FnOnce(&mut MqttSettings<Secret>)) -> Self {
        Self::start(max_messages, false, change, consumer()).await
    }

    async fn start(
        max_messages: usize,
        leave: bool,
        change: impl FnOnce(&mut MqttSettings<Secret>),
        settings: ConsumerSettings,
    ) -> Self {
        let broker = FakeBroker::new().await;
        let mut mqtt = broker.settings();
        change(&mut mqtt);
        let registry = Registry::new();
        let health = Health::default();
        let (sender, receiver) = queue::bounded(max_messages, 1 << 20, ());
        let settlements = Arc::new(Settlements::new(1));
        let metrics = Metrics::new(&registry).unwrap();
        let source_metrics = SourceMetrics::new(&registry).unwrap();
        let sessions = Arc::new(SessionMemory::default());
        let source = Source {
            broker: mqtt,
            settings,
            settlements: settlements.clone(),
            health: health.dependency("broker"),
            metrics: metrics.clone(),
            source_metrics: source_metrics.clone(),
            sessions: sessions.clone(),
        };
        let shutdown = CancellationToken::new();
        let mut task = JoinSet::new();
        let end = shutdown.clone();
        task.spawn(async move {
            if leave {
                return source.leave(sender, end).await;
            }
            source.run(sender, end).await;
            Ok(())
        });
        Self {
            broker,
            health,
            metrics,
            source_metrics,
            sessions,
            shutdown,
            settlements,
            receiver,
            waiting: VecDeque::new(),
            next_ticket: 0,
            task,
        }
    }

    /// The next message in receipt order.
    pub(crate) async fn take(&mut self) -> Taken {
        while self.waiting.is_empty() {
            let mut intake = self.receiver.intake().await;
            let chunk = timeout(SOON, intake.receiver.recv()).await.expect("a message is read");
            self.waiting.extend(chunk.expect("the source has not ended"));
        }
        let delivery = self.waiting.pop_front().unwrap();
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.settlements.begin(ticket, delivery.received);
        let text = String::from_utf8_lossy(&delivery.payload).into_owned();
        let (malformed, bytes) = (delivery.malformed, delivery.size());
        Taken { text, malformed, ticket, bytes, ack: delivery.ack.unwrap() }
    }

    /// As [`Rig::take`], several times.
    pub(crate) async fn take_all(&mut self, count: usize) -> Vec<Taken> {
        let mut all = Vec::new();
        while all.len() < count {
            all.push(self.take().await);
        }
        all
    }

    /// What a writer does when the batch is committed, save that the room in the queue stays taken.
    pub(crate) fn settle(&self, taken: Taken) {
        self.settlements.report(taken.ticket, vec![Settled { ack: taken.ack, rejected: None }]);
    }

    /// The other half: room for what comes next.
    pub(crate) fn free(&self, taken: &Taken) {
        self.receiver.level().free(1, taken.bytes);
    }

    /// Bytes that they occupy.
    pub(crate) fn held_bytes(&self) -> usize {
        self.receiver.level().bytes()
    }

    /// Connections that ended for this reason.
    pub(crate) fn ended_by(&self, reason: &str) -> u64 {
        self.source_metrics.connections_ended.with_label_values(&[reason]).get()
    }

    /// Messages received from the broker that still occupy room.
    pub(crate) fn held(&self) -> usize {
        self.receiver.level().messages()
    }

    pub(crate) fn problem(&self) -> Option<String> {
        self.health.failing().get("broker").cloned()
    }

    /// Waits until the source says that this is wrong with the broker.
    pub(crate) async fn until_problem(&self, words: &str) {
        self.until(|| self.problem().is_some_and(|problem| problem.contains(words)), words).await;
    }

    pub(crate) async fn until_ready(&self) {
        self.until(|| self.problem().is_none(), "ready").await;
    }

    pub(crate) async fn until(&self, condition: impl Fn() -> bool, what: &str) {
        let deadline = Instant::now() + SOON;
        while !condition() {
            assert!(Instant::now() < deadline, "not {what}; the broker: {:?}", self.problem());
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// Asks the source to end, ends the writer, and waits for the source.
    pub(crate) async fn end(self) {
        self.shutdown.cancel();
        self.ended().await.unwrap();
    }

    /// Ends the writer when the source has closed the queue, and waits for the source.
    pub(crate) async fn ended(mut self) -> anyhow::Result<()> {
        let mut intake = self.receiver.intake().await;
        let closed = timeout(SOON, async { while intake.receiver.recv().await.is_some() {} }).await;
        closed.expect("the source closes the queue");
        drop(intake);
        self.settlements.leave();
        timeout(SOON, self.task.join_next()).await.expect("the source ends").unwrap().unwrap()
    }
}
