//! RabbitMQ as Tier0 uses it: a connection, a bound for what it holds, and the queues that must be there.
//!
//! One attempt each, with a timeout; whoever calls decides whether and when to try again. lapin's own recovery is not
//! used: it gives up after some minutes, and acknowledgements must not outlive their connection. No message is read or
//! written here.

use std::time::Duration;

use async_rs::Runtime;
use lapin::protocol::AMQPSoftError;
use lapin::types::LongString;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{Connection, ConnectionProperties};
use service::secret::Secret;
use tokio::time::timeout;
use wire::rabbitmq::RabbitSettings;

mod gate;
mod legible;
mod queues;
mod refusal;

pub use gate::Gate;
pub use queues::{Declared, Found, declare, exists, find};
use refusal::{Doing, explain};

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
        explain(&error, Doing::Other)
    }
}

/// Connects and logs in. `name` is what the broker's administrator sees.
///
/// # Errors
/// [`AmqpError::Retry`], within the connect timeout.
pub async fn connect(broker: &Broker, name: &str) -> Result<Connection, AmqpError> {
    connect_gated(broker, name, Gate::new(u64::MAX)).await
}

/// As [`connect`], reading no more than the gate allows. Each connection has a gate of its own.
///
/// # Errors
/// As [`connect`].
pub async fn connect_gated(broker: &Broker, name: &str, gate: Gate) -> Result<Connection, AmqpError> {
    let runtime = Runtime::new(gate::kit(gate));
    let connecting = Connection::connect_uri_with_runtime(uri(broker), properties(name), runtime);
    let connected = within(broker.connect_timeout, connecting).await;
    connected.map_err(|failure| failure.explain("connecting", Doing::LoggingIn))
}

/// One request to the broker, as far as it answers in time.
///
/// # Errors
/// [`AmqpError::Retry`] with the broker's refusal and what it means, or that there was no answer.
pub async fn in_time<T>(
    wait: Duration,
    work: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, AmqpError> {
    match within(wait, work).await {
        Ok(outcome) => Ok(outcome),
        Err(Failure::Lapin(error)) => Err(error.into()),
        Err(Failure::Late(wait)) => {
            Err(AmqpError::Retry(format!("the broker did not answer within {wait:?}")))
        }
    }
}

fn properties(name: &str) -> ConnectionProperties {
    ConnectionProperties::default().with_connection_name(LongString::from(name))
}

fn uri(broker: &Broker) -> AMQPUri {
    let heartbeat = u16::try_from(broker.heartbeat.as_secs()).unwrap_or(u16::MAX);
    let password = match broker.password.expose() {
        "" => broker.username.clone(),
        password => password.to_owned(),
    };
    AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo { username: broker.username.clone(), password },
            host: broker.host.clone(),
            port: broker.port,
        },
        vhost: broker.vhost.clone(),
        query: AMQPQueryString { heartbeat: Some(heartbeat), ..AMQPQueryString::default() },
    }
}

/// As far as the broker answers in time.
async fn within<T>(
    wait: Duration,
    work: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, Failure> {
    match timeout(wait, work).await {
        Ok(outcome) => outcome.map_err(Failure::Lapin),
        Err(_) => Err(Failure::Late(wait)),
    }
}

#[derive(Debug)]
enum Failure {
    Lapin(lapin::Error),
    Late(Duration),
}

impl Failure {
    fn is(&self, kind: &AMQPSoftError) -> bool {
        matches!(self, Self::Lapin(error) if queues::is(error, kind))
    }

    /// `what` it was about comes first.
    fn explain(&self, what: &str, doing: Doing) -> AmqpError {
        AmqpError::Retry(match self {
            Self::Lapin(error) => format!("{what}: {}", explain(error, doing)),
            Self::Late(wait) => format!("{what}: the broker did not answer within {wait:?}"),
        })
    }
}
