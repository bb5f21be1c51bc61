//! Puts back what the broker itself has moved to the dead-letter queue.
//!
//! A delivery limit, an expiry or a limit of length, set by somebody's policy, moves events out of the queue that nobody
//! has judged. They are good events: they go back to the end of their queue, published and confirmed before they are taken
//! out of the dead-letter queue. So none is lost; one may come twice, which merging makes harmless.
//!
//! What we refused ourselves stays for people. AMQP can take messages from the front of a queue only, so that is published
//! to the end again: a pass over the queue sees each message once. There is a pass at the start, and whenever more has come
//! than we published ourselves.

use std::time::Duration;

use amqp::{AmqpError, Broker, in_time};
use lapin::message::BasicGetMessage;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation};
use service::backoff::Backoff;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::letter::{Fate, again, fate, is_to_spare};
use super::metrics::SourceMetrics;

pub use super::letter::REASONS;

/// Between two looks at how many messages there are.
const PERIOD: Duration = Duration::from_secs(5);
/// Before what must wait is looked at again; and the longest pause after failures.
const PAUSE: Duration = Duration::from_secs(60);
/// A pass that puts nothing back is followed by a pause of so many times its length: another consumer's copies, or its pass,
/// look like news, and each pass writes the whole queue anew.
const REST: u32 = 20;
const LONGEST_REST: Duration = Duration::from_secs(600);
/// Taken, published and confirmed together; all of it is in memory.
const GROUP: usize = 100;
const GROUP_BYTES: usize = 1 << 20;
const NAME: &str = "tier0 rabbitmq-consumer, returns";

/// One per process, beside the source.
#[derive(Debug)]
pub struct Returns {
    broker: Broker,
    metrics: SourceMetrics,
    started: Instant,
    /// Messages there were when the last pass ended, and copies of poison published by then.
    left: Option<(u32, u64)>,
    /// What was said last, so that it is not said every minute.
    said: Option<String>,
}

/// What a pass did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Pass {
    seen: u32,
    returned: u32,
    waiting: u32,
    discarded: u32,
}

impl Returns {
    #[must_use]
    pub fn new(broker: Broker, metrics: SourceMetrics) -> Self {
        Self { broker, metrics, started: Instant::now(), left: None, said: None }
    }

    /// Runs until shutdown; never fails: what is in the dead-letter queue is safe there.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut connection = None;
        let mut pause = PERIOD;
        let mut backoff = Backoff::new(PERIOD, PAUSE);
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return,
            }
            pause = match self.visit(&mut connection, &shutdown).await {
                Ok(pause) => {
                    self.said = None;
                    backoff.reset();
                    pause
                }
                Err(error) => {
                    connection = None;
                    let wait = backoff.next(rand::random());
                    let error = error.to_string();
                    if self.said.as_ref() != Some(&error) {
                        tracing::warn!(error, again_in = ?wait, "the dead-letter queue was not looked at");
                        self.said = Some(error);
                    }
                    wait
                }
            };
        }
    }

    async fn visit(
        &mut self,
        connection: &mut Option<lapin::Connection>,
        shutdown: &CancellationToken,
    ) -> Result<Duration, AmqpError> {
        let connection = match connection {
            Some(connection) => connection,
            None => connection.insert(amqp::connect(&self.broker, NAME).await?),
        };
        let Some(queue) = amqp::find(connection, &self.broker, &self.broker.queue).await? else {
            return Ok(PERIOD);
        };
        self.metrics.queue_consumers.set(queue.consumers.into());
        let letters = self.broker.dead_letter_queue();
        let Some(found) = amqp::find(connection, &self.broker, &letters).await? else {
            self.left = None;
            return Ok(PERIOD);
        };
        let published = self.metrics.dead_lettered.with_label_values(&["published"]).get();
        let expected = self.left.map(|(left, by_then)| u64::from(left) + (published - by_then));
        if found.messages == 0 || expected == Some(found.messages.into()) {
            self.left = Some((found.messages, published));
            return Ok(PERIOD);
        }
        let began = Instant::now();
        let pass = self.pass(connection, &letters, found.messages, false, shutdown).await?;
        let rest = began.elapsed().saturating_mul(REST).clamp(PERIOD, LONGEST_REST);
        if pass.returned > 0 {
            tracing::error!(
                events = pass.returned,
                queue = self.broker.queue,
                "the broker had moved events to the dead-letter queue by itself; they are back in their queue. Lift the limit \
                 that did it: docs/runbooks/rabbitmq-queue.md"
            );
        }
        self.left = Some((pass.seen - pass.returned, published));
        if pass.waiting > 0 {
            self.left = None;
            return Ok(PAUSE.max(rest));
        }
        Ok(if pass.returned > 0 { PERIOD } else { rest })
    }

    /// Removes the copies of what we refused that have their row in `dead_letters`, and nothing else. Returns how many, and how
    /// many other messages were left or put back.
    ///
    /// # Errors
    /// When the broker cannot be reached or refuses; what was removed by then stays removed.
    pub async fn discard_refused(&self, shutdown: &CancellationToken) -> Result<(u32, u32), AmqpError> {
        let connection = amqp::connect(&self.broker, NAME).await?;
        let letters = self.broker.dead_letter_queue();
        let Some(found) = amqp::find(&connection, &self.broker, &letters).await? else { return Ok((0, 0)) };
        let pass = self.pass(&connection, &letters, found.messages, true, shutdown).await?;
        Ok((pass.discarded, pass.seen - pass.discarded))
    }

    /// Looks at each of so many messages once.
    async fn pass(
        &self,
        connection: &lapin::Connection,
        letters: &str,
        messages: u32,
        discard: bool,
        shutdown: &CancellationToken,
    ) -> Result<Pass, AmqpError> {
        let wait = self.broker.connect_timeout;
        let channel = in_time(wait, connection.create_channel()).await?;
        in_time(wait, channel.confirm_select(ConfirmSelectOptions::default())).await?;
        self.may_publish(&channel, letters).await?;
        let mut pass = Pass::default();
        while pass.seen < messages && !shutdown.is_cancelled() {
            let group = self.take(&channel, letters, (messages - pass.seen) as usize).await?;
            let Some(last) = group.last().map(|message| message.delivery.delivery_tag) else { break };
            let mut published = Vec::with_capacity(group.len());
            for message in group {
                let delivery = message.delivery;
                pass.seen += 1;
                let fate = fate(&delivery.properties, &self.broker.queue, self.started.elapsed());
                let to = match fate {
                    Fate::Keep if discard && is_to_spare(&delivery.properties) => {
                        pass.discarded += 1;
                        continue;
                    }
                    Fate::Return { before, .. } => {
                        note_suspect(before);
                        self.broker.queue.as_str()
                    }
                    Fate::Wait { .. } => {
                        pass.waiting += 1;
                        letters
                    }
                    Fate::Keep => letters,
                };
                let properties = again(&delivery.properties, fate);
                let confirm = in_time(wait, publish(&channel, to, &delivery.data, properties)).await?;
                published.push((fate, delivery, confirm));
            }
            let mut reasons = Vec::new();
            for (fate, delivery, confirm) in published {
                let taken = is_taken(&in_time(wait, confirm).await?);
                match fate {
                    Fate::Return { reason, .. } if taken => reasons.push(reason),
                    // Its queue is full. Giving it back would count as one more delivery, which may be one too many here too.
                    Fate::Return { .. } => {
                        let properties = again(&delivery.properties, Fate::Keep);
                        let sent = publish(&channel, letters, &delivery.data, properties);
                        let confirm = in_time(wait, sent).await?;
                        kept(is_taken(&in_time(wait, confirm).await?), letters)?;
                        pass.waiting += 1;
                    }
                    Fate::Wait { .. } | Fate::Keep => kept(taken, letters)?,
                }
            }
            in_time(wait, channel.basic_ack(last, BasicAckOptions { multiple: true })).await?;
            for reason in reasons {
                self.metrics.returned.with_label_values(&[reason]).inc();
                pass.returned += 1;
            }
        }
        Ok(pass)
    }

    /// Before a message is taken: one that cannot be published would be delivered again and again, which a limit counts.
    async fn may_publish(&self, channel: &Channel, letters: &str) -> Result<(), AmqpError> {
        let nowhere = format!("{letters}.nowhere");
        let options = BasicPublishOptions::default();
        let wait = self.broker.connect_timeout;
        let sent = channel.basic_publish(
            "".into(),
            nowhere.as_str().into(),
            options,
            &[],
            BasicProperties::default(),
        );
        let confirm = in_time(wait, sent).await?;
        in_time(wait, confirm).await.map(drop).map_err(|error| {
            AmqpError::Retry(format!(
                "{error}. Events that the broker moved to {letters} stay there: give {} the right `write` on `amq.default`",
                self.broker.username
            ))
        })
    }

    async fn take(
        &self,
        channel: &Channel,
        letters: &str,
        most: usize,
    ) -> Result<Vec<BasicGetMessage>, AmqpError> {
        let wait = self.broker.connect_timeout;
        let mut group = Vec::new();
        let mut bytes = 0;
        while group.len() < most.min(GROUP) && bytes < GROUP_BYTES {
            let got = in_time(wait, channel.basic_get(letters.into(), BasicGetOptions::default())).await?;
            let Some(message) = got else { break };
            bytes += message.delivery.data.len();
            group.push(message);
        }
        Ok(group)
    }
}

/// Confirmed, and by a queue: a message that comes back with its confirm has none.
fn is_taken(confirmation: &Confirmation) -> bool {
    matches!(confirmation, Confirmation::Ack(None))
}

/// What was to go to the dead-letter queue again must be there before it is taken out.
fn kept(taken: bool, letters: &str) -> Result<(), AmqpError> {
    if taken {
        return Ok(());
    }
    Err(AmqpError::Retry(format!(
        "queue {letters} takes no message now: is it full? What is in it stays there"
    )))
}

fn note_suspect(before: i64) {
    if before >= 3 {
        tracing::error!(
            times = before,
            "an event has been moved to the dead-letter queue again and again: either a delivery limit is far too low, or this \
             event ends the consumer"
        );
    }
}

async fn publish(
    channel: &Channel,
    queue: &str,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<lapin::PublisherConfirm, lapin::Error> {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    channel.basic_publish("".into(), queue.into(), options, payload, properties).await
}
