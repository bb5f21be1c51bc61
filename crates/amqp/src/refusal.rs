//! What a refusal of the broker means and what to do about it, in words.

use lapin::ErrorKind;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};

use crate::AmqpError;

/// What we were about to do, and the right that takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Doing {
    LoggingIn,
    Declaring,
    Binding,
    Other,
}

impl Doing {
    /// The right of RabbitMQ's that it takes (`rabbitmqctl set_permissions USER CONFIGURE WRITE READ`).
    fn right(self) -> &'static str {
        match self {
            Self::Declaring => {
                "this takes the right `configure` on that name, and `read` and `write` for a dead-letter exchange"
            }
            Self::Binding => "this takes the right `write` on the queue and `read` on the exchange",
            Self::LoggingIn | Self::Other => {
                "to consume takes `read` on the queue, to publish `write` on the exchange (`amq.default` for the \
                 nameless one)"
            }
        }
    }
}

/// The broker's own text first, then what to do.
pub(crate) fn explain(error: &lapin::Error, doing: Doing) -> AmqpError {
    let hint = match error.kind() {
        ErrorKind::ProtocolError(refusal) => hint(refusal.kind(), &refusal.get_message().to_string(), doing),
        ErrorKind::MissingHeartbeatError => "the broker has been silent for two heartbeats",
        _ => return AmqpError::Retry(error.to_string()),
    };
    AmqpError::Retry(if hint.is_empty() { error.to_string() } else { format!("{error}: {hint}") })
}

fn hint(kind: &AMQPErrorKind, text: &str, doing: Doing) -> &'static str {
    match kind {
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) if matches!(doing, Doing::LoggingIn) => {
            "the user or the password is wrong (rabbitmq.username, rabbitmq.password); guest may log in from the \
             broker's own machine only"
        }
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) if text.contains("exclusive") => {
            "another consumer has this queue for itself alone (an exclusive consumer): stop that one"
        }
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => doing.right(),
        AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED) => {
            "another connection has declared this queue as exclusive; it vanishes with that connection, and all in it. \
             Declare it as a durable queue there"
        }
        AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED)
            if text.contains("delivery acknowledgement") =>
        {
            "the broker waited longer than its consumer_timeout for an acknowledgement. Nothing is lost: it delivers the \
             messages again. Set consumer_timeout above rabbitmq_consumer.requeue_after"
        }
        AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => {
            "is rabbitmq.vhost the right virtual host, and has this user rights in it (rabbitmqctl list_permissions -p \
             VHOST)?"
        }
        AMQPErrorKind::Hard(AMQPHardError::CONNECTIONFORCED) => {
            "the broker is ending, or somebody closed this connection"
        }
        _ => "",
    }
}
