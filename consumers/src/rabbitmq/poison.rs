//! Poison goes to the dead-letter exchange with its reason in a header, on a connection of its own.
//!
//! A copy for people who look at the broker: the row in `dead_letters` is committed already, or there were too many for one.
//! Therefore this never holds anything up: when the broker takes no messages now (away, or out of memory or disk), there is
//! no copy.

use std::time::Duration;

use amqp::{AmqpError, Broker};
use ingest::settlement::Refused;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::time::{Instant, timeout};

/// Longest wait for the broker to confirm the letters published at once.
const CONFIRM_WAIT: Duration = Duration::from_secs(2);
/// After a failure no copy is tried for so long.
const PAUSE: Duration = Duration::from_secs(5);
/// Published at once: the client copies all of it before the first byte is sent.
const MAX_BYTES_AT_ONCE: usize = 1 << 20;
/// A copy holds no more of its message; the row in `dead_letters` says how long it was.
const MAX_COPY_BYTES: usize = 64 << 10;
/// More copies are not put where the broker keeps messages on disk: with the bound above, 640 MB of them.
const MAX_COPIES: u32 = 10_000;
/// Between two looks at how many there are.
const LOOK: Duration = Duration::from_secs(1);
const PERSISTENT: u8 = 2;
const NAME: &str = "tier0 rabbitmq-consumer, dead letters";

/// The header that says why.
pub const REASON_HEADER: &str = "x-tier0-reason";
/// The header that says whether its row is in `dead_letters`, with its payload.
pub const STORED_HEADER: &str = "x-tier0-stored";
/// The header that says where it came from.
pub const QUEUE_HEADER: &str = "x-tier0-queue";

/// Publishes refused messages.
pub struct Poison {
    broker: Broker,
    open: Option<(lapin::Connection, Channel)>,
    paused_until: Option<Instant>,
    room: Room,
}

/// Whether the dead-letter queue may have more copies.
#[derive(Default)]
struct Room {
    looked: Option<Instant>,
    is_full: bool,
}

impl Room {
    async fn is_full(&mut self, broker: &Broker, connection: &lapin::Connection) -> Result<bool, AmqpError> {
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            let letters = broker.dead_letter_queue();
            let found = amqp::find(connection, broker, &letters).await?;
            let is_full = found.is_some_and(|found| found.messages >= MAX_COPIES);
            if is_full && !self.is_full {
                tracing::warn!(
                    queue = letters,
                    messages = MAX_COPIES,
                    "the dead-letter queue is full: no more copies of refused messages until there are fewer"
                );
            }
            (self.looked, self.is_full) = (Some(Instant::now()), is_full);
        }
        Ok(self.is_full)
    }
}

impl Poison {
    /// Connects when there is something to publish.
    #[must_use]
    pub fn new(broker: Broker) -> Self {
        Self { broker, open: None, paused_until: None, room: Room::default() }
    }

    /// Publishes these as far as the broker takes them; says how many it has.
    pub async fn publish(&mut self, refused: &[&Refused]) -> u64 {
        let mut published = 0;
        let mut rest = refused;
        while !rest.is_empty() {
            if self.paused_until.is_some_and(|until| Instant::now() < until) {
                break;
            }
            let (now, later) = rest.split_at(at_once(rest));
            rest = later;
            let outcome = match timeout(CONFIRM_WAIT, self.try_publish(now, &mut published)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(AmqpError::Retry(format!("not confirmed within {CONFIRM_WAIT:?}"))),
            };
            match outcome {
                Ok(()) => self.paused_until = None,
                Err(error) => {
                    tracing::warn!(%error, again_in = ?PAUSE, "no copies in the dead-letter queue; the messages are in dead_letters");
                    self.open = None;
                    self.paused_until = Some(Instant::now() + PAUSE);
                }
            }
        }
        published
    }

    async fn try_publish(&mut self, refused: &[&Refused], published: &mut u64) -> Result<(), AmqpError> {
        if self.open.as_ref().is_some_and(|(connection, _)| !connection.status().connected()) {
            self.open = None;
        }
        let (connection, channel) = match &self.open {
            Some(open) => open,
            None => self.open.insert(open(&self.broker).await?),
        };
        if self.room.is_full(&self.broker, connection).await? {
            return Ok(());
        }
        let exchange = self.broker.dead_letter_exchange();
        let mut confirms = Vec::with_capacity(refused.len());
        for letter in refused {
            let text = |text: &str| AMQPValue::LongString(LongString::from(text));
            let mut headers = FieldTable::default();
            headers.insert(REASON_HEADER.into(), text(letter.reason.as_str()));
            headers.insert(STORED_HEADER.into(), AMQPValue::Boolean(letter.has_row));
            headers.insert(QUEUE_HEADER.into(), text(&self.broker.queue));
            let properties = BasicProperties::default().with_delivery_mode(PERSISTENT).with_headers(headers);
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let key = String::from_utf8_lossy(&letter.topic);
            let key = key.as_ref().into();
            let to = exchange.as_str().into();
            let payload = letter.payload.get(..MAX_COPY_BYTES).unwrap_or(&letter.payload);
            let sent = channel.basic_publish(to, key, options, payload, properties);
            confirms.push(sent.await?);
        }
        let mut returned = 0;
        for confirm in confirms {
            match confirm.await? {
                Confirmation::Ack(None) => *published += 1,
                // Nobody was there to keep it.
                _ => returned += 1,
            }
        }
        if returned > 0 {
            return Err(AmqpError::Retry(format!(
                "the broker keeps none of {returned} copies: no queue is bound to exchange {exchange}, or the queue is full"
            )));
        }
        Ok(())
    }
}

/// How many of the first ones.
fn at_once(refused: &[&Refused]) -> usize {
    let mut bytes = 0;
    let fitting = refused.iter().take_while(|letter| {
        bytes += letter.payload.len().min(MAX_COPY_BYTES);
        bytes <= MAX_BYTES_AT_ONCE
    });
    fitting.count().max(1)
}

async fn open(broker: &Broker) -> Result<(lapin::Connection, Channel), AmqpError> {
    let connection = amqp::connect(broker, NAME).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok((connection, channel))
}
