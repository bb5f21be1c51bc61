//! RabbitMQ as Tier0 uses it: a connection, and the queues that must be there.
//!
//! One attempt each, with a timeout; whoever calls decides whether and when to try again. lapin's own recovery is not
//! used: it gives up after some minutes, and acknowledgements must not outlive their connection. No message is read or
//! written here.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use service::secret::Secret;
use tokio::time::timeout;
use wire::rabbitmq::RabbitSettings;

/// How to reach the broker, with the password kept from logs.
pub type Broker = RabbitSettings<Secret>;

/// Named for what to do next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AmqpError {
    /// Trying again later may help.
    #[error("{0}")]
    Retry(String),
    /// It will not: what is there does not fit the settings.
    #[error("{0}")]
    Settings(String),
}

impl From<lapin::Error> for AmqpError {
    fn from(error: lapin::Error) -> Self {
        Self::Retry(error.to_string())
    }
}

/// Connects and logs in. `name` is what the broker's administrator sees.
///
/// # Errors
/// [`AmqpError::Retry`], within the connect timeout.
pub async fn connect(broker: &Broker, name: &str) -> Result<Connection, AmqpError> {
    let heartbeat = u16::try_from(broker.heartbeat.as_secs()).unwrap_or(u16::MAX);
    let password = match broker.password.expose() {
        "" => broker.username.clone(),
        password => password.to_owned(),
    };
    let uri = AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo { username: broker.username.clone(), password },
            host: broker.host.clone(),
            port: broker.port,
        },
        vhost: broker.vhost.clone(),
        query: AMQPQueryString { heartbeat: Some(heartbeat), ..AMQPQueryString::default() },
    };
    let properties = ConnectionProperties::default().with_connection_name(LongString::from(name));
    within(broker.connect_timeout, "connecting", Connection::connect_uri(uri, properties))
        .await
        .map_err(AmqpError::from)
}

/// Makes sure that there is a queue for messages, and an exchange and a queue for its dead letters. What is there
/// already, and as it should be, stays.
///
/// # Errors
/// [`AmqpError::Settings`] when the queue is there with other arguments.
pub async fn declare(connection: &Connection, broker: &Broker) -> Result<(), AmqpError> {
    if !broker.declare {
        return if exists(connection, broker).await? {
            Ok(())
        } else {
            let queue = &broker.queue;
            Err(AmqpError::Retry(format!("there is no queue {queue}, and rabbitmq.declare is false")))
        };
    }
    let wait = broker.connect_timeout;
    let channel = within(wait, "opening a channel", connection.create_channel()).await?;
    let (exchange, letters) = (broker.dead_letter_exchange(), broker.dead_letter_queue());
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let declared = channel.exchange_declare(
        exchange.as_str().into(),
        ExchangeKind::Fanout,
        durable,
        FieldTable::default(),
    );
    clear(within(wait, "declaring", declared).await, "exchange", &exchange)?;
    let kind = |table: &mut FieldTable| {
        let kind = LongString::from(broker.queue_type.as_str());
        table.insert("x-queue-type".into(), AMQPValue::LongString(kind));
    };
    let mut of_letters = FieldTable::default();
    kind(&mut of_letters);
    let mut of_messages = FieldTable::default();
    kind(&mut of_messages);
    let target = LongString::from(exchange.as_str());
    of_messages.insert("x-dead-letter-exchange".into(), AMQPValue::LongString(target));
    for (name, arguments) in [(&letters, of_letters), (&broker.queue, of_messages)] {
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let declared = channel.queue_declare(name.as_str().into(), durable, arguments);
        clear(within(wait, "declaring", declared).await, "queue", name)?;
    }
    let bound = channel.queue_bind(
        letters.as_str().into(),
        exchange.as_str().into(),
        "".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    Ok(within(wait, "binding", bound).await?)
}

/// Whether the queue is there, whatever its arguments.
///
/// # Errors
/// [`AmqpError::Retry`] when the broker does not say.
pub async fn exists(connection: &Connection, broker: &Broker) -> Result<bool, AmqpError> {
    let wait = broker.connect_timeout;
    let channel = within(wait, "opening a channel", connection.create_channel()).await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(broker.queue.as_str().into(), passive, FieldTable::default());
    match timeout(wait, declared).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) if is(&error, &AMQPSoftError::NOTFOUND) => Ok(false),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(AmqpError::Retry(format!("the broker did not answer within {wait:?}"))),
    }
}

/// As far as the broker answers in time.
async fn within<T>(
    wait: Duration,
    what: &str,
    work: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, Failure> {
    match timeout(wait, work).await {
        Ok(outcome) => outcome.map_err(Failure::Lapin),
        Err(_) => Err(Failure::Late(format!("{what}: the broker did not answer within {wait:?}"))),
    }
}

#[derive(Debug)]
enum Failure {
    Lapin(lapin::Error),
    Late(String),
}

impl From<Failure> for AmqpError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Lapin(error) => error.into(),
            Failure::Late(text) => Self::Retry(text),
        }
    }
}

/// Says which setting does not fit what is there.
fn clear<T>(declared: Result<T, Failure>, what: &str, name: &str) -> Result<(), AmqpError> {
    match declared {
        Ok(_) => Ok(()),
        Err(Failure::Lapin(error)) if is(&error, &AMQPSoftError::PRECONDITIONFAILED) => {
            Err(AmqpError::Settings(format!(
                "{what} {name} is there with other arguments: set rabbitmq.queue_type to what it is, or \
                 rabbitmq.declare=false to use it as it is, or rabbitmq.queue to another name, or delete it ({error})"
            )))
        }
        Err(failure) => Err(failure.into()),
    }
}

fn is(error: &lapin::Error, kind: &AMQPSoftError) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if *error.kind() == AMQPErrorKind::Soft(kind.clone()))
}
