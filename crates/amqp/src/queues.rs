//! The queues that must be there.
//!
//! A queue that is there is used as it is, whatever its kind and its arguments: it may belong to its publisher. What is
//! missing is created so that the broker throws nothing away: see [`of_messages`].

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{Connection, ErrorKind, ExchangeKind, Queue};
use wire::rabbitmq::QueueType;

use crate::refusal::Doing;
use crate::{AmqpError, Broker, Failure, within};

/// A queue of ours counts deliveries and never acts on the count. RabbitMQ 4 moves a message away at its 20th by itself, and
/// without a dead-letter exchange drops it; an outage of the database must not turn good events into that. (A policy may
/// still set a lower limit: the lower of both holds. RabbitMQ 3 knows no value for "none".)
const NO_DELIVERY_LIMIT: i64 = 1_000_000_000;

/// What was found, or made, when the queues were looked after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declared {
    /// What was there when it was looked at; a queue just made has nothing.
    pub found: Found,
    /// The queue was missing and has been made.
    pub created: bool,
    /// It was missing although the queue for its dead letters was there: somebody has deleted it, with all in it.
    pub had_been_deleted: bool,
    /// How a queue that was there differs from one that we would make, in the broker's words, as far as we may ask. Names one
    /// difference: the broker looks no further.
    pub difference: Option<String>,
    /// Why there is no place for dead letters. They are in the database all the same.
    pub no_dead_letters: Option<String>,
}

/// A queue as the broker describes it to anybody who asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Messages that wait; those delivered and not acknowledged are not counted.
    pub messages: u32,
    pub consumers: u32,
}

/// Makes sure that there is a queue for messages, and an exchange and a queue for its dead letters.
///
/// # Errors
/// [`AmqpError::Retry`]: without a queue there is nothing to consume, so trying again is all there is to do.
pub async fn declare(connection: &Connection, broker: &Broker) -> Result<Declared, AmqpError> {
    let name = &broker.queue;
    let letters = broker.dead_letter_queue();
    let mut declared = Declared {
        found: Found::default(),
        created: false,
        had_been_deleted: false,
        difference: None,
        no_dead_letters: None,
    };
    let there = find(connection, broker, name).await?;
    if there.is_none() && !broker.declare {
        return Err(AmqpError::Retry(format!("there is no queue {name}, and rabbitmq.declare is false")));
    }
    if broker.declare {
        let had_letters = find(connection, broker, &letters).await.ok().flatten().is_some();
        declared.had_been_deleted = there.is_none() && had_letters;
        // First: a queue of ours refers to it, and the broker takes no message off a queue that refers to nothing.
        declared.no_dead_letters = place_for_letters(connection, broker, had_letters).await.err();
    }
    match there {
        Some(found) => {
            declared.found = found;
            if broker.declare {
                if is_stream(connection, broker).await {
                    return Err(AmqpError::Settings(format!(
                        "queue {name} is a stream: what is acknowledged stays in it, and what came while no consumer was there \
                         would be skipped. Set rabbitmq.queue to a quorum or classic queue, bound to the same exchange"
                    )));
                }
                declared.difference = difference(connection, broker, of_messages(broker)).await;
            }
        }
        None => declared.created = create(connection, broker, name, of_messages(broker)).await?,
    }
    Ok(declared)
}

/// Whether the queue is there, whatever its arguments.
///
/// # Errors
/// [`AmqpError::Retry`] when the broker does not say.
pub async fn exists(connection: &Connection, broker: &Broker) -> Result<bool, AmqpError> {
    Ok(find(connection, broker, &broker.queue).await?.is_some())
}

/// Asks for a queue, whatever its arguments; takes no right but to log in. `None` when it is not there.
///
/// # Errors
/// [`AmqpError::Retry`] when the broker does not say, or when the queue belongs to another connection alone.
pub async fn find(connection: &Connection, broker: &Broker, queue: &str) -> Result<Option<Found>, AmqpError> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match declare_queue(connection, broker, queue, passive, FieldTable::default()).await {
        Ok(queue) => Ok(Some(Found { messages: queue.message_count(), consumers: queue.consumer_count() })),
        Err(failure) if failure.is(&AMQPSoftError::NOTFOUND) => Ok(None),
        Err(failure) => Err(failure.explain(&format!("queue {queue}"), Doing::Other)),
    }
}

/// Of a queue that has just been found: AMQP can only ask by declaring, which would make one.
async fn difference(connection: &Connection, broker: &Broker, arguments: FieldTable) -> Option<String> {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declared = declare_queue(connection, broker, &broker.queue, durable, arguments).await;
    match declared {
        Err(Failure::Lapin(error)) if is(&error, &AMQPSoftError::PRECONDITIONFAILED) => {
            Some(error.to_string())
        }
        _ => None,
    }
}

/// As far as we may ask. Its messages say so too, in a header; but that a publisher can write as well.
async fn is_stream(connection: &Connection, broker: &Broker) -> bool {
    let mut arguments = FieldTable::default();
    let kind = LongString::from(broker.queue_type.as_str());
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind));
    difference(connection, broker, arguments).await.is_some_and(|words| says_stream(&words))
}

/// In the broker's words: "inequivalent arg 'x-queue-type' for queue 'NAME' in vhost '/': received 'quorum' but current is
/// 'stream'", or "current is the value 'stream'".
fn says_stream(words: &str) -> bool {
    words.contains("'x-queue-type'")
        && words.rsplit_once("but current is").is_some_and(|(_, is)| is.contains("'stream'"))
}

/// Arguments of a queue of ours.
///
/// A classic queue has none, so that a publisher may declare it plainly (`durable` and nothing else), as most do. A quorum
/// queue must be asked for by argument, so its publishers say `passive` or the same arguments anyway; it gets what keeps
/// the broker from throwing messages away: dead letters stay in it until their queue has confirmed them, and a limit of
/// its length, set by a policy, refuses new messages instead of dropping old ones.
fn of_messages(broker: &Broker) -> FieldTable {
    let mut arguments = of_letters(broker);
    if broker.queue_type == QueueType::Quorum {
        let exchange = broker.dead_letter_exchange();
        for (key, value) in [
            ("x-dead-letter-exchange", exchange.as_str()),
            ("x-dead-letter-strategy", "at-least-once"),
            ("x-overflow", "reject-publish"),
        ] {
            arguments.insert(key.into(), AMQPValue::LongString(LongString::from(value)));
        }
    }
    arguments
}

fn of_letters(broker: &Broker) -> FieldTable {
    let mut arguments = FieldTable::default();
    if broker.queue_type == QueueType::Quorum {
        let kind = LongString::from(broker.queue_type.as_str());
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind));
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(NO_DELIVERY_LIMIT));
    }
    arguments
}

/// `false` when somebody else was quicker.
async fn create(
    connection: &Connection,
    broker: &Broker,
    queue: &str,
    arguments: FieldTable,
) -> Result<bool, AmqpError> {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    match declare_queue(connection, broker, queue, durable, arguments).await {
        Ok(_) => Ok(true),
        Err(failure) if failure.is(&AMQPSoftError::PRECONDITIONFAILED) => {
            match find(connection, broker, queue).await? {
                Some(_) => Ok(false),
                None => Err(failure.explain(&format!("queue {queue} cannot be made"), Doing::Declaring)),
            }
        }
        Err(failure) => {
            Err(failure
                .explain(&format!("there is no queue {queue}, and it cannot be made"), Doing::Declaring))
        }
    }
}

/// Says in words why there is none.
async fn place_for_letters(
    connection: &Connection,
    broker: &Broker,
    had_letters: bool,
) -> Result<(), String> {
    let (exchange, letters) = (broker.dead_letter_exchange(), broker.dead_letter_queue());
    let text = |error: AmqpError| error.to_string();
    let wait = broker.connect_timeout;
    if !has_exchange(connection, broker, &exchange).await.map_err(text)? {
        let channel = within(wait, connection.create_channel()).await;
        let channel = channel.map_err(|failure| text(failure.explain("opening a channel", Doing::Other)))?;
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let declared = channel.exchange_declare(
            exchange.as_str().into(),
            ExchangeKind::Fanout,
            durable,
            FieldTable::default(),
        );
        within(wait, declared)
            .await
            .map_err(|failure| text(failure.explain(&format!("exchange {exchange}"), Doing::Declaring)))?;
    }
    if !had_letters {
        create(connection, broker, &letters, of_letters(broker)).await.map_err(text)?;
    }
    let channel = within(wait, connection.create_channel()).await;
    let channel = channel.map_err(|failure| text(failure.explain("opening a channel", Doing::Other)))?;
    let options = QueueBindOptions::default();
    let bound = channel.queue_bind(
        letters.as_str().into(),
        exchange.as_str().into(),
        "".into(),
        options,
        FieldTable::default(),
    );
    let bound = within(wait, bound).await;
    bound
        .map_err(|failure| text(failure.explain(&format!("binding {letters} to {exchange}"), Doing::Binding)))
}

/// Whatever its kind: it is used as it is.
async fn has_exchange(connection: &Connection, broker: &Broker, exchange: &str) -> Result<bool, AmqpError> {
    let wait = broker.connect_timeout;
    let channel = within(wait, connection.create_channel()).await;
    let channel = channel.map_err(|failure| failure.explain("opening a channel", Doing::Other))?;
    let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    let declared =
        channel.exchange_declare(exchange.into(), ExchangeKind::Fanout, passive, FieldTable::default());
    match within(wait, declared).await {
        Ok(()) => Ok(true),
        Err(failure) if failure.is(&AMQPSoftError::NOTFOUND) => Ok(false),
        Err(failure) => Err(failure.explain(&format!("exchange {exchange}"), Doing::Declaring)),
    }
}

/// On a channel of its own: a refusal closes it.
async fn declare_queue(
    connection: &Connection,
    broker: &Broker,
    queue: &str,
    options: QueueDeclareOptions,
    arguments: FieldTable,
) -> Result<Queue, Failure> {
    let wait = broker.connect_timeout;
    let channel = within(wait, connection.create_channel()).await?;
    let declared = within(wait, channel.queue_declare(queue.into(), options, arguments)).await?;
    // A broker allows so many channels on a connection. Closing one that is dropped is lapin's business too.
    match within(wait, channel.close(200, "OK".into())).await {
        Ok(()) => Ok(declared),
        Err(failure) => Err(failure),
    }
}

pub(crate) fn is(error: &lapin::Error, kind: &AMQPSoftError) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if *error.kind() == AMQPErrorKind::Soft(kind.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_known_by_its_type_and_not_by_its_name() {
        let words = |name: &str, received: &str, is: &str| {
            format!(
                "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue '{name}' in vhost '/': received {received} but current is {is}"
            )
        };
        assert!(says_stream(&words("q", "'quorum'", "'stream'")));
        let (quorum, stream) =
            ("the value 'quorum' of type 'longstr'", "the value 'stream' of type 'longstr'");
        assert!(says_stream(&words("q", quorum, stream)));
        assert!(!says_stream(&words("stream", "'quorum'", "'classic'")));
        assert!(!says_stream(&words("'stream'", "none", "the value 'quorum' of type 'longstr'")));
        assert!(!says_stream(
            "inequivalent arg 'durable' for queue 'stream': received 'true' but current is 'false'"
        ));
    }
}
