//! One consuming connection: its window set, its deliveries taken, its acknowledgements sent.
//!
//! What it holds is bounded twice: the window, in messages, by the broker; and in bytes by a gate at the socket, since the
//! AMQP client itself queues whatever it reads. Deliveries are taken from the client at once, whether or not there is
//! room for them further on: there each still has its headers, which can be much larger in memory than on the wire.
//!
//! Nothing is published here: the broker blocks connections that publish when it runs out of memory or disk, and a
//! blocked one could not acknowledge either.

use std::collections::VecDeque;
use std::pin::{Pin, pin};
use std::time::Duration;

use amqp::{AmqpError, Broker, Declared, Gate, in_time};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use ingest::delivery::{Ack, Delivery};
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

use super::window::Window;

/// Handed to the writers at once: enough to share the cost, few enough to begin soon.
const MAX_CHUNK: usize = 256;

/// Or so many bytes, if that is less: what is decoded at once is bounded by it.
const MAX_CHUNK_BYTES: usize = 1 << 20;

/// How the broker's administrator sees us.
const NAME: &str = "tier0 rabbitmq-consumer";

/// On every message of a stream, and on those of publishers who write it.
const STREAM_HEADER: &str = "x-stream-offset";

type Pending<T> = Pin<Box<dyn Future<Output = Result<T, AmqpError>> + Send>>;

/// Where a change of the window stands: the broker takes one only for a new consumer.
enum Change {
    None,
    Ending(Pending<()>),
    /// The broker has answered. What it had sent before is still to be taken; an end of the stream comes after it.
    Ended,
    Beginning(Pending<Consumer>),
}

/// A connection that consumes.
pub struct Connection {
    inner: lapin::Connection,
    channel: Channel,
    consumer: Consumer,
    gate: Gate,
    window: Window,
    change: Change,
    /// Taken from the client, not yet handed on.
    backlog: VecDeque<Delivery>,
    backlog_bytes: usize,
    /// An end that was met while something else was awaited.
    ended: Option<AmqpError>,
    /// Which of the process' connections this is.
    generation: u32,
    queue: Bytes,
    wait: Duration,
    redelivered: u64,
    last_tag: u64,
    /// Of what may be a stream.
    has_warned: bool,
}

impl Connection {
    /// Connects, looks after the queues, sets the window, then consumes. About `max_bytes` may wait here.
    ///
    /// # Errors
    /// [`AmqpError::Retry`]; the queue may be made, or rights given, later.
    pub async fn open(
        broker: &Broker,
        window: Window,
        max_bytes: u64,
        generation: u32,
    ) -> Result<(Self, Declared), AmqpError> {
        let wait = broker.connect_timeout;
        let gate = Gate::new(max_bytes);
        let inner = amqp::connect_gated(broker, NAME, gate.clone()).await?;
        let declared = amqp::declare(&inner, broker).await?;
        let opening = async {
            let channel = inner.create_channel().await?;
            let queue = broker.queue.as_str().into();
            let consumer = consume(&channel, queue, window.now()).await?;
            Ok::<_, AmqpError>((channel, consumer))
        };
        let Ok(opened) = timeout(wait, opening).await else {
            let queue = &broker.queue;
            return Err(AmqpError::Retry(format!(
                "queue {queue} does not answer within {wait:?}. `rabbitmq-queues quorum_status {queue}` says whether it has a \
                 leader; one that was declared only seconds before its broker was killed never gets one and must be deleted"
            )));
        };
        let (channel, consumer) = opened?;
        let connection = Self {
            inner,
            channel,
            consumer,
            gate,
            window,
            change: Change::None,
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            ended: None,
            generation,
            queue: Bytes::copy_from_slice(broker.queue.as_bytes()),
            wait,
            redelivered: 0,
            last_tag: 0,
            has_warned: false,
        };
        Ok((connection, declared))
    }

    /// Whether the broker is still there, as far as its heartbeats tell.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.inner.status().connected() && self.channel.status().connected()
    }

    /// What the broker may have outstanding, in messages.
    #[must_use]
    pub fn window(&self) -> u16 {
        self.window.now()
    }

    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Messages taken since the last call that had been delivered before, to us or to others.
    pub fn redelivered(&mut self) -> u64 {
        std::mem::take(&mut self.redelivered)
    }

    #[must_use]
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The next messages for the writers.
    pub fn chunk(&mut self) -> Vec<Delivery> {
        let mut chunk = Vec::new();
        let mut bytes = 0;
        while chunk.len() < MAX_CHUNK && bytes < MAX_CHUNK_BYTES {
            let Some(delivery) = self.backlog.pop_front() else { break };
            bytes += weight(&delivery);
            chunk.push(delivery);
        }
        self.backlog_bytes -= bytes;
        self.gate.take(bytes);
        chunk
    }

    /// Takes from the client what has been delivered: waits for the first, takes what else is there. May return without any. Cancelling
    /// loses nothing.
    ///
    /// # Errors
    /// When the connection, the channel or the consumer has ended.
    pub async fn fill(&mut self) -> Result<(), AmqpError> {
        if let Some(error) = self.ended.take() {
            return Err(error);
        }
        if let Change::Beginning(consumer) = &mut self.change {
            self.consumer = consumer.await?;
            self.change = Change::None;
        }
        let read = self.gate.read();
        let mut next = match self.consumer.next().now_or_never() {
            Some(next) => next,
            None => {
                self.gate.taken_all(read, self.backlog_bytes);
                let ending = async {
                    match &mut self.change {
                        Change::Ending(ended) => ended.await,
                        _ => std::future::pending().await,
                    }
                };
                tokio::select! {
                    next = self.consumer.next() => next,
                    ended = ending => {
                        self.change = Change::Ended;
                        return ended;
                    }
                    () = self.gate.closed() => return Ok(()),
                }
            }
        };
        let received = Instant::now();
        let mut taken = 0;
        loop {
            match next {
                Some(Ok(delivery)) => self.keep(delivery, received)?,
                Some(Err(error)) => return Err(error.into()),
                None if matches!(self.change, Change::Ending(_) | Change::Ended) => {
                    self.begin();
                    return Ok(());
                }
                None => {
                    return Err(AmqpError::Retry("the broker ended the consumer: is the queue gone?".into()));
                }
            }
            taken += 1;
            if taken == MAX_CHUNK {
                break;
            }
            // Whatever is taken here must be kept.
            match self.consumer.next().now_or_never() {
                Some(more) => next = more,
                None => break,
            }
        }
        if matches!(self.change, Change::None) && self.window.change().is_some() {
            let (channel, tag) = (self.channel.clone(), self.consumer.tag());
            let cancelling =
                async move { Ok(channel.basic_cancel(tag, BasicCancelOptions::default()).await?) };
            self.change = Change::Ending(Box::pin(cancelling));
        }
        Ok(())
    }

    /// Works on something else; deliveries are taken meanwhile.
    pub async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                outcome = &mut work => return outcome,
                filled = self.fill(), if self.ended.is_none() => self.ended = filled.err(),
            }
        }
    }

    /// Everything of the old consumer has been taken: delivery tags of the new one are higher.
    fn begin(&mut self) {
        let (channel, window, wait) = (self.channel.clone(), self.window.now(), self.wait);
        let queue = self.consumer.queue();
        self.change = Change::Beginning(Box::pin(async move {
            match timeout(wait, consume(&channel, queue, window)).await {
                Ok(consumer) => consumer,
                Err(_) => Err(AmqpError::Retry(format!("the broker took no new window within {wait:?}"))),
            }
        }));
    }

    fn keep(&mut self, delivery: lapin::message::Delivery, received: Instant) -> Result<(), AmqpError> {
        let headers = delivery.properties.headers().as_ref();
        if !self.has_warned && headers.is_some_and(|headers| headers.inner().contains_key(STREAM_HEADER)) {
            self.has_warned = true;
            tracing::warn!(
                queue = %String::from_utf8_lossy(&self.queue),
                "a message says that it is from a stream. If its publisher has not written that, the queue is one, and this \
                 consumer had no right to ask: what comes while no consumer is there would be skipped"
            );
        }
        // An acknowledgement covers all tags below it, so none may have passed us by.
        if delivery.delivery_tag != self.last_tag + 1 {
            return Err(AmqpError::Retry(format!(
                "delivery {} came after {}: one between them was lost in the client, so nothing more may be acknowledged here",
                delivery.delivery_tag, self.last_tag
            )));
        }
        self.last_tag = delivery.delivery_tag;
        self.redelivered += u64::from(delivery.redelivered);
        let delivery = self.delivery(delivery, received);
        self.window.saw(weight(&delivery));
        self.backlog_bytes += weight(&delivery);
        self.backlog.push_back(delivery);
        Ok(())
    }

    fn delivery(&self, delivery: lapin::message::Delivery, received: Instant) -> Delivery {
        let key = delivery.routing_key.as_str().as_bytes();
        let topic = if key == self.queue { self.queue.clone() } else { Bytes::copy_from_slice(key) };
        let ack = Ack { connection: self.generation, id: delivery.delivery_tag };
        // A payload of several frames was put together in a vector up to twice its size.
        let payload = Bytes::from(delivery.data.into_boxed_slice());
        Delivery::new(topic, payload, Some(ack), received)
    }

    /// Acknowledges everything up to and including this tag.
    ///
    /// # Errors
    /// When the connection has ended or takes nothing more.
    pub async fn acknowledge(&mut self, up_to: u64) -> Result<(), AmqpError> {
        in_time(self.wait, self.channel.basic_ack(up_to, BasicAckOptions { multiple: true })).await
    }

    /// Gives everything unacknowledged back to the queue.
    ///
    /// # Errors
    /// As [`Connection::acknowledge`].
    pub async fn requeue_all(&mut self) -> Result<(), AmqpError> {
        let all = BasicNackOptions { multiple: true, requeue: true };
        in_time(self.wait, self.channel.basic_nack(0, all)).await
    }

    /// Ends consuming, and gives back to the queue what was delivered and never handed out. What was can still be
    /// acknowledged.
    ///
    /// # Errors
    /// As [`Connection::acknowledge`].
    pub async fn stop(&mut self) -> Result<(), AmqpError> {
        let mut back: Vec<u64> =
            self.backlog.drain(..).filter_map(|delivery| Some(delivery.ack?.id)).collect();
        self.backlog_bytes = 0;
        if let Change::Beginning(consumer) = &mut self.change {
            self.consumer = consumer.await?;
            self.change = Change::None;
        }
        let (gate, mut consumer) = (self.gate.clone(), self.consumer.clone());
        let mut cancelling: Pending<()> = match std::mem::replace(&mut self.change, Change::None) {
            Change::Ending(cancelling) => cancelling,
            Change::Ended => Box::pin(std::future::pending()),
            _ => {
                let (channel, tag) = (self.channel.clone(), self.consumer.tag());
                Box::pin(async move { Ok(channel.basic_cancel(tag, BasicCancelOptions::default()).await?) })
            }
        };
        // The answer comes after all that the broker has sent before, so that is taken, and only its tags are kept.
        let draining = async {
            loop {
                let read = gate.read();
                let next = consumer.next().now_or_never();
                if next.is_none() {
                    gate.taken_all(read, 0);
                }
                let next = match next {
                    Some(next) => next,
                    None => tokio::select! {
                        next = consumer.next() => next,
                        () = gate.closed() => continue,
                        cancelled = &mut cancelling => {
                            cancelled?;
                            while let Some(Some(Ok(delivery))) = consumer.next().now_or_never() {
                                back.push(delivery.delivery_tag);
                            }
                            return Ok::<(), AmqpError>(());
                        }
                    },
                };
                match next {
                    Some(Ok(delivery)) => back.push(delivery.delivery_tag),
                    Some(Err(error)) => return Err(error.into()),
                    None => return Ok(()),
                }
            }
        };
        match timeout(self.wait, draining).await {
            Ok(outcome) => outcome?,
            // What is unacknowledged goes back when the connection closes.
            Err(_) => {
                tracing::warn!(within = ?self.wait, "the broker still sends; its messages go back with the connection");
            }
        }
        for tag in back {
            let one = BasicNackOptions { multiple: false, requeue: true };
            in_time(self.wait, self.channel.basic_nack(tag, one)).await?;
        }
        Ok(())
    }

    /// Says goodbye; what is unacknowledged goes back to the queue.
    pub async fn close(self, patience: Duration) {
        // The channel first: its process at the broker answers when it has taken in every acknowledgement before.
        said(timeout(patience, self.channel.close(200, "OK".into())).await);
        said(timeout(patience, self.inner.close(200, "OK".into())).await);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // One that has said goodbye has ended by itself.
        if self.inner.status().connected() {
            self.gate.cut();
        }
    }
}

/// What a message weighs on the wire, at least: more would open the gate too wide.
fn weight(delivery: &Delivery) -> usize {
    delivery.payload.len() + delivery.topic.len()
}

async fn consume(channel: &Channel, queue: ShortString, window: u16) -> Result<Consumer, AmqpError> {
    channel.basic_qos(window, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    Ok(channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?)
}

fn said(goodbye: Result<Result<(), lapin::Error>, Elapsed>) {
    match goodbye {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "goodbye not sent"),
        Err(_) => tracing::debug!("goodbye not answered in time"),
    }
}
