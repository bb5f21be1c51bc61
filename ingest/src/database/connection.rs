//! One connection: opened, checked, driven.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinHandle;
use tokio_postgres::error::Severity;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls};
use tokio_util::sync::CancellationToken;

use super::handshake::{self, OpenError, refuses_options};

/// A session, and the task that moves its bytes.
pub(super) type Opened = (Client, JoinHandle<()>);

/// Opens a session with one node. It ends when `cut` is cancelled: the server is told nothing, least of all to cancel. `bare`
/// remembers that what listens there takes no start-up `options`.
///
/// # Errors
/// The driver's, or why a session that works is not used.
pub(super) async fn open(
    config: &Config,
    bare: &AtomicBool,
    cut: CancellationToken,
) -> Result<Opened, OpenError> {
    let mut is_bare = bare.load(Ordering::Relaxed);
    let attempt =
        if is_bare { config.connect(NoTls).await } else { with_options(config).connect(NoTls).await };
    let (client, connection) = match attempt {
        Err(error) if !is_bare && refuses_options(&error) => {
            tracing::info!(%error, "a pooler takes no start-up options; settings are set after the login");
            bare.store(true, Ordering::Relaxed);
            is_bare = true;
            config.connect(NoTls).await?
        }
        opened => opened?,
    };
    let in_use = Arc::new(AtomicBool::new(false));
    let driver = drive(connection, cut, in_use.clone());
    // Whatever the login has to say comes before this answer.
    let took_options = handshake::greet(&client, is_bare).await?;
    if !took_options {
        probe(config, is_bare).await?;
    }
    in_use.store(true, Ordering::SeqCst);
    Ok((client, driver))
}

/// What takes no options is a pooler. In transaction mode it gives the session that has just been opened, and is idle, to the
/// next client: a second one finds the mark of the first.
///
/// # Errors
/// When it does, or the second client is not let in.
async fn probe(config: &Config, is_bare: bool) -> Result<(), OpenError> {
    let second = if is_bare { config.clone() } else { with_options(config) };
    let (client, connection) = second.connect(NoTls).await?;
    // Driven by whoever asks, so that both end together.
    tokio::select! {
        asked = handshake::unmarked(&client) => asked,
        ended = connection => match ended {
            Err(error) => Err(error.into()),
            Ok(()) => Err(OpenError::Refused("the session ended before it was used".into())),
        },
    }
}

fn with_options(config: &Config) -> Config {
    let mut config = config.clone();
    config.options(wire::postgres::options());
    config
}

/// Runs a connection's input and output. It ends, and every call on the client fails, when the server says that it
/// gave up waiting for the standby: the COMMIT that follows would report success for a row that is on one machine.
#[allow(
    clippy::disallowed_methods,
    reason = "whoever opened it owns the handle; the task ends with the client"
)]
fn drive<S, T>(
    mut connection: tokio_postgres::Connection<S, T>,
    cut: CancellationToken,
    in_use: Arc<AtomicBool>,
) -> JoinHandle<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                () = cut.cancelled() => {
                    tracing::debug!("connection dropped: another node is the primary");
                    return;
                }
                message = std::future::poll_fn(|context| connection.poll_message(context)) => message,
            };
            match message {
                Some(Ok(AsyncMessage::Notice(notice))) => {
                    // At login a server may warn of itself (a changed collation): that is no commit's outcome.
                    let unreplicated = in_use.load(Ordering::SeqCst)
                        && is_unreplicated(notice.parsed_severity(), notice.code().code(), notice.where_());
                    if unreplicated {
                        tracing::error!(
                            notice = notice.message(),
                            "a commit is not on the standby; connection dropped"
                        );
                        return;
                    }
                    tracing::debug!(notice = notice.message(), "notice from Postgres");
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::debug!(%error, "connection to Postgres ended");
                    return;
                }
                None => return,
            }
        }
    })
}

/// Whether a notice says that the server gave up waiting for the standby. Its words depend on the server's language, its
/// fields do not: a warning of the generic code, or of a shutdown, with no statement it happened in (a trigger's warning
/// names its function). COMMIT has no other warning; a wrong yes costs one more try of the batch, a wrong no a promise.
fn is_unreplicated(severity: Option<Severity>, code: &str, context: Option<&str>) -> bool {
    severity == Some(Severity::Warning) && matches!(code, "01000" | "57P01") && context.is_none()
}

#[allow(clippy::disallowed_methods, reason = "only to fill the pool's type on a path that returns an error")]
pub(super) fn idle_driver() -> JoinHandle<()> {
    tokio::spawn(async {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_given_up_is_known_by_its_fields() {
        let trigger = Some("PL/pgSQL function x() line 1 at RAISE");
        for (severity, code, context, expected) in [
            // canceling wait for synchronous replication due to user request
            (Severity::Warning, "01000", None, true),
            // canceling the wait for synchronous replication and terminating connection due to administrator command
            (Severity::Warning, "57P01", None, true),
            (Severity::Warning, "25P01", None, false), // ROLLBACK after a COPY that failed: no transaction
            (Severity::Warning, "01000", trigger, false),
            (Severity::Notice, "01000", None, false),
            (Severity::Notice, "42P07", None, false), // the temporary table is there already
        ] {
            assert_eq!(is_unreplicated(Some(severity), code, context), expected, "{severity:?} {code}");
        }
        assert!(!is_unreplicated(None, "01000", None));
    }
}
