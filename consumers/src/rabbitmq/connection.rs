//! One consuming connection: its queues declared, its window set, its deliveries and acknowledgements.
//!
//! Nothing is published here: the broker blocks connections that publish when it runs out of memory or disk, and a
//! blocked one could not acknowledge either.

use std::time::Duration;

use amqp::{AmqpError, Broker};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use ingest::delivery::{Ack, Delivery};
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    BasicRejectOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};

/// Handed to the writers at once: enough to share the cost, few enough to begin soon.
const MAX_CHUNK: usize = 256;

/// Or so many bytes, if that is less: what is decoded at once is bounded by it.
const MAX_CHUNK_BYTES: usize = 1 << 20;

/// How the broker's administrator sees us.
const NAME: &str = "tier0 rabbitmq-consumer";

/// A connection that consumes.
pub struct Connection {
    inner: lapin::Connection,
    channel: Channel,
    consumer: Consumer,
    /// The consumer's end, when messages came before it.
    ended: Option<AmqpError>,
    /// Which of the process' connections this is.
    generation: u32,
    queue: Bytes,
    wait: Duration,
}

impl Connection {
    /// Connects, declares, sets the window, then consumes.
    ///
    /// # Errors
    /// [`AmqpError::Settings`] when the queue is there with other arguments.
    pub async fn open(broker: &Broker, prefetch: u16, generation: u32) -> Result<Self, AmqpError> {
        let wait = broker.connect_timeout;
        let inner = amqp::connect(broker, NAME).await?;
        amqp::declare(&inner, broker).await?;
        let consuming = async {
            let channel = inner.create_channel().await?;
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            let queue = broker.queue.as_str().into();
            let options = BasicConsumeOptions::default();
            let consumer = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
            Ok::<_, lapin::Error>((channel, consumer))
        };
        let Ok(consuming) = timeout(wait, consuming).await else {
            let queue = &broker.queue;
            return Err(AmqpError::Retry(format!(
                "queue {queue} does not answer within {wait:?}. `rabbitmq-queues quorum_status {queue}` says whether it has a \
                 leader; one that was declared only seconds before its broker was killed never gets one and must be deleted"
            )));
        };
        let (channel, consumer) = consuming?;
        let queue = Bytes::copy_from_slice(broker.queue.as_bytes());
        Ok(Self { inner, channel, consumer, ended: None, generation, queue, wait })
    }

    /// Whether the broker is still there, as far as its heartbeats tell.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.inner.status().connected() && self.channel.status().connected()
    }

    /// What has been delivered: waits for the first, takes what else is there. Cancelling loses nothing.
    ///
    /// # Errors
    /// When the connection, the channel or the consumer has ended.
    pub async fn deliveries(&mut self) -> Result<Vec<Delivery>, AmqpError> {
        if let Some(error) = self.ended.take() {
            return Err(error);
        }
        let mut next = self.consumer.next().await;
        let received = Instant::now();
        let mut chunk = Vec::new();
        let mut bytes = 0;
        loop {
            match next {
                Some(Ok(delivery)) => {
                    bytes += delivery.data.len();
                    chunk.push(self.delivery(delivery, received));
                }
                end => {
                    let error = match end {
                        Some(Err(error)) => error.into(),
                        _ => AmqpError::Retry("the broker ended the consumer: is the queue gone?".into()),
                    };
                    if chunk.is_empty() {
                        return Err(error);
                    }
                    self.ended = Some(error);
                    return Ok(chunk);
                }
            }
            if chunk.len() >= MAX_CHUNK || bytes >= MAX_CHUNK_BYTES {
                return Ok(chunk);
            }
            match self.consumer.next().now_or_never() {
                Some(more) => next = more,
                None => return Ok(chunk),
            }
        }
    }

    fn delivery(&self, delivery: lapin::message::Delivery, received: Instant) -> Delivery {
        let key = delivery.routing_key.as_str().as_bytes();
        let topic = if key == self.queue { self.queue.clone() } else { Bytes::copy_from_slice(key) };
        let ack = Ack { connection: self.generation, id: delivery.delivery_tag };
        Delivery { topic, payload: delivery.data.into(), ack: Some(ack), received }
    }

    /// Acknowledges everything up to and including this tag.
    ///
    /// # Errors
    /// When the connection has ended or takes nothing more.
    pub async fn acknowledge(&self, up_to: u64) -> Result<(), AmqpError> {
        in_time(self.wait, self.channel.basic_ack(up_to, BasicAckOptions { multiple: true })).await
    }

    /// Lets the broker pass a message to the dead-letter exchange.
    ///
    /// # Errors
    /// As [`Connection::acknowledge`].
    pub async fn reject(&self, tag: u64) -> Result<(), AmqpError> {
        in_time(self.wait, self.channel.basic_reject(tag, BasicRejectOptions { requeue: false })).await
    }

    /// Gives everything unacknowledged back to the queue.
    ///
    /// # Errors
    /// As [`Connection::acknowledge`].
    pub async fn requeue_all(&self) -> Result<(), AmqpError> {
        let all = BasicNackOptions { multiple: true, requeue: true };
        in_time(self.wait, self.channel.basic_nack(0, all)).await
    }

    /// Ends consuming, and gives back to the queue what was delivered and never handed out. What was can still be
    /// acknowledged.
    ///
    /// # Errors
    /// As [`Connection::acknowledge`].
    pub async fn stop(&mut self) -> Result<(), AmqpError> {
        let cancelled = self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
        in_time(self.wait, cancelled).await?;
        while let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never() {
            let one = BasicNackOptions { multiple: false, requeue: true };
            in_time(self.wait, self.channel.basic_nack(delivery.delivery_tag, one)).await?;
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

fn said(goodbye: Result<Result<(), lapin::Error>, Elapsed>) {
    match goodbye {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "goodbye not sent"),
        Err(_) => tracing::debug!("goodbye not answered in time"),
    }
}

async fn in_time<T>(
    wait: Duration,
    work: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, AmqpError> {
    match timeout(wait, work).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(AmqpError::Retry(format!("the broker took nothing for {wait:?}"))),
    }
}
