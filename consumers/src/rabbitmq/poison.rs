//! Poison goes to the dead-letter exchange with its reason in a header, on a connection of its own.
//!
//! Only a copy for people who look at the broker: the row in `dead_letters` is committed already. Therefore this never
//! holds anything up: when the broker takes no messages now (away, or out of memory or disk), the caller rejects the
//! message and the broker passes it on by itself, without the reason.

use std::time::Duration;

use amqp::{AmqpError, Broker};
use ingest::settlement::Refused;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::time::{Instant, timeout};

/// Longest wait for the broker to confirm the letters of one settlement.
const CONFIRM_WAIT: Duration = Duration::from_secs(2);
/// After a failure the broker's own way is used for so long.
const PAUSE: Duration = Duration::from_secs(5);
const PERSISTENT: u8 = 2;
const NAME: &str = "tier0 rabbitmq-consumer, dead letters";

/// The header that says why.
pub const REASON_HEADER: &str = "x-tier0-reason";
/// The header that says where it came from.
pub const QUEUE_HEADER: &str = "x-tier0-queue";

/// Publishes refused messages.
pub struct Poison {
    broker: Broker,
    open: Option<(lapin::Connection, Channel)>,
    paused_until: Option<Instant>,
}

impl Poison {
    /// Connects when there is something to publish.
    #[must_use]
    pub fn new(broker: Broker) -> Self {
        Self { broker, open: None, paused_until: None }
    }

    /// Publishes these; says for each whether the broker has it.
    pub async fn publish(&mut self, refused: &[&Refused]) -> Vec<bool> {
        let mut confirmed = vec![false; refused.len()];
        if self.paused_until.is_some_and(|until| Instant::now() < until) {
            return confirmed;
        }
        let outcome = match timeout(CONFIRM_WAIT, self.try_publish(refused, &mut confirmed)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(AmqpError::Retry(format!("not confirmed within {CONFIRM_WAIT:?}"))),
        };
        match outcome {
            Ok(()) => self.paused_until = None,
            Err(error) => {
                tracing::warn!(%error, "dead letters not published; the broker passes them on without their reason");
                self.open = None;
                self.paused_until = Some(Instant::now() + PAUSE);
            }
        }
        confirmed
    }

    async fn try_publish(&mut self, refused: &[&Refused], confirmed: &mut [bool]) -> Result<(), AmqpError> {
        if self.open.as_ref().is_some_and(|(connection, _)| !connection.status().connected()) {
            self.open = None;
        }
        let (_, channel) = match &self.open {
            Some(open) => open,
            None => self.open.insert(open(&self.broker).await?),
        };
        let exchange = self.broker.dead_letter_exchange();
        let mut confirms = Vec::with_capacity(refused.len());
        for letter in refused {
            let text = |text: &str| AMQPValue::LongString(LongString::from(text));
            let mut headers = FieldTable::default();
            headers.insert(REASON_HEADER.into(), text(letter.reason.as_str()));
            headers.insert(QUEUE_HEADER.into(), text(&self.broker.queue));
            let properties = BasicProperties::default().with_delivery_mode(PERSISTENT).with_headers(headers);
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let key = String::from_utf8_lossy(&letter.topic);
            let key = key.as_ref().into();
            let exchange = exchange.as_str().into();
            let published = channel.basic_publish(exchange, key, options, &letter.payload, properties);
            confirms.push(published.await?);
        }
        for (confirm, confirmed) in confirms.into_iter().zip(confirmed) {
            // With a returned message in it nobody was there to keep it.
            *confirmed = matches!(confirm.await?, Confirmation::Ack(None));
        }
        Ok(())
    }
}

async fn open(broker: &Broker) -> Result<(lapin::Connection, Channel), AmqpError> {
    let connection = amqp::connect(broker, NAME).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok((connection, channel))
}
