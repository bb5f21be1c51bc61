//! One connection's task: connect, tick, reconnect for ever, drain at the end.
//!
//! The socket is not registered with the runtime once the connection is up: a tick reads what came and writes what
//! is due, two system calls for any number of messages, and no PUBACK wakes anybody in between. The price is that an
//! acknowledgement is seen up to a tick late.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::BytesMut;
use service::backoff::Backoff;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use super::protocol;
use super::publisher::Publisher;
use super::shared::Shared;
use crate::seeds::{join, unit};

/// At full speed a tick is at most this long: acknowledgements are what makes room for more.
const UNPACED_TICK: Duration = Duration::from_millis(2);
/// How often silence is looked at, at least.
const SILENCE: Duration = Duration::from_secs(1);
/// Rounds of filling and writing before other tasks get their turn.
const ROUNDS: u32 = 8;
/// Longest wait at the end for the broker to close its side.
const GOODBYE: Duration = Duration::from_secs(2);

/// Connection `number` of the fleet.
#[derive(Debug)]
pub struct Connection {
    number: u32,
    client_id: String,
    publisher: Arc<Mutex<Publisher>>,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
    /// Set when the shutdown is first seen: then outstanding answers are waited for until here.
    deadline: Option<Duration>,
    reported_finished: bool,
}

/// How a session ended well.
enum Ended {
    Settled,
    OutOfTime,
}

/// What a tick came to.
struct Ticked {
    settled: bool,
    /// Next time there is something to do.
    wake: Duration,
}

impl Connection {
    #[must_use]
    pub fn new(
        number: u32,
        client_id: String,
        publisher: Arc<Mutex<Publisher>>,
        shared: Arc<Shared>,
        shutdown: CancellationToken,
    ) -> Self {
        Self { number, client_id, publisher, shared, shutdown, deadline: None, reported_finished: false }
    }

    /// Publishes until the shutdown, then waits for what is outstanding, at most the grace period.
    ///
    /// # Errors
    /// None; it is a task of a process.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut backoff =
            Backoff::new(Duration::from_millis(100), self.shared.settings.device_simulator.max_backoff);
        let mut tries = 0_u64;
        loop {
            if self.is_over() {
                return Ok(());
            }
            tries += 1;
            let problem = match self.connect().await {
                Ok(stream) => {
                    backoff.reset();
                    self.shared.connection_up();
                    let ended = self.session(&stream).await;
                    self.shared.connection_down();
                    match ended {
                        Ok(Ended::Settled) => {
                            self.say_goodbye(&stream).await;
                            return Ok(());
                        }
                        Ok(Ended::OutOfTime) => return Ok(()),
                        Err(problem) => {
                            self.publisher().lost();
                            self.shared.metrics.reconnects.inc();
                            problem
                        }
                    }
                }
                Err(problem) => problem,
            };
            self.shared.report(&problem);
            let random = unit(join(self.shared.run ^ u64::from(self.number), tries));
            let wait = backoff.next(random.into());
            tracing::debug!(
                connection = self.number,
                ?wait,
                problem = format!("{problem:#}"),
                "connection down"
            );
            self.pause(wait).await;
        }
    }

    fn publisher(&self) -> MutexGuard<'_, Publisher> {
        self.publisher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the shutdown; true when nothing is left to do or no time is left to do it.
    fn is_over(&mut self) -> bool {
        let now = self.shared.now().since;
        let mut publisher = self.publisher();
        publisher.idle(now);
        if !self.shutdown.is_cancelled() {
            return false;
        }
        publisher.stop();
        let settled = publisher.is_settled();
        drop(publisher);
        let deadline = *self.deadline.get_or_insert(now + self.shared.settings.device_simulator.grace);
        settled || now >= deadline
    }

    /// Sleeps, but not past the shutdown or the end of the grace period.
    async fn pause(&self, wait: Duration) {
        match self.deadline {
            None => tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.shutdown.cancelled() => {}
            },
            Some(deadline) => {
                let left = deadline.saturating_sub(self.shared.now().since);
                tokio::time::sleep(wait.min(left)).await;
            }
        }
    }

    async fn connect(&self) -> anyhow::Result<TcpStream> {
        let mqtt = &self.shared.settings.mqtt;
        // Thousands of connections must not knock at once.
        let _permit = self.shared.gate.acquire().await.context("wait for a turn to connect")?;
        let handshake = tokio::time::timeout(mqtt.connect_timeout, self.handshake());
        let connected = match self.deadline {
            None => tokio::select! {
                connected = handshake => connected,
                () = self.shutdown.cancelled() => bail!("the simulator ends"),
            },
            Some(_) => handshake.await,
        };
        connected
            .map_err(|_| anyhow!("no answer within {:?}", mqtt.connect_timeout))
            .flatten()
            .with_context(|| format!("connect to MQTT at {}:{}", mqtt.host, mqtt.port))
    }

    async fn handshake(&self) -> anyhow::Result<TcpStream> {
        let mqtt = &self.shared.settings.mqtt;
        let mut stream = tokio::net::TcpStream::connect((mqtt.host.as_str(), mqtt.port)).await?;
        stream.set_nodelay(true)?;
        let login = (!mqtt.username.is_empty()).then(|| (mqtt.username.as_str(), mqtt.password.expose()));
        stream.write_all(&protocol::connect(&self.client_id, mqtt.keep_alive, login)).await?;
        let mut inbox = BytesMut::new();
        let limits = loop {
            if let Some(limits) = protocol::connack(&mut inbox)? {
                break limits;
            }
            if stream.read_buf(&mut inbox).await? == 0 {
                bail!("the broker closed the connection before its CONNACK");
            }
        };
        let qos = self.shared.settings.device_simulator.qos;
        if qos > limits.qos {
            bail!("the broker takes QoS {} at most, device_simulator.qos is {qos}", limits.qos);
        }
        let now = self.shared.now().since;
        let mut publisher = self.publisher();
        publisher.connected(limits, now);
        publisher.read(&inbox, now)?;
        Ok(stream.into_std()?)
    }

    async fn session(&mut self, stream: &TcpStream) -> anyhow::Result<Ended> {
        loop {
            let over = self.is_over();
            let ticked = self.tick(stream)?;
            if self.deadline.is_some() && ticked.settled {
                return Ok(Ended::Settled);
            }
            if over {
                return Ok(Ended::OutOfTime);
            }
            let wait = ticked.wake.saturating_sub(self.shared.now().since);
            if wait.is_zero() {
                tokio::task::yield_now().await;
            } else {
                self.pause(wait).await;
            }
        }
    }

    /// Reads what came, makes what is due, writes what the socket takes.
    fn tick(&mut self, stream: &TcpStream) -> anyhow::Result<Ticked> {
        let now = self.shared.now();
        let settings = &self.shared.settings;
        let mut publisher = self.publisher.lock().unwrap_or_else(PoisonError::into_inner);
        receive(stream, &mut publisher, now.since)?;
        publisher.check_silence(settings.mqtt.keep_alive, now.since).map_err(|problem| anyhow!(problem))?;
        let mut blocked = false;
        for _ in 0..ROUNDS {
            let made = publisher.fill(self.shared.now());
            blocked = !send(stream, &mut publisher, now.since)?;
            if made == 0 || blocked {
                break;
            }
        }
        if publisher.is_finished() && publisher.is_settled() && !self.reported_finished {
            self.reported_finished = true;
            self.shared.connection_finished();
        }
        let wake = wake(self.number, &self.shared, &publisher, blocked, now.since);
        Ok(Ticked { settled: publisher.is_settled(), wake })
    }

    /// DISCONNECT, then the end of our side; waits for the broker to end its own, so that it has read everything.
    async fn say_goodbye(&self, stream: &TcpStream) {
        let farewell = async {
            loop {
                let sent = {
                    let mut publisher = self.publisher();
                    if publisher.to_write().is_empty() {
                        publisher.say_goodbye();
                    }
                    send(stream, &mut publisher, self.shared.now().since)?
                };
                if sent {
                    break;
                }
                tokio::time::sleep(UNPACED_TICK).await;
            }
            stream.shutdown(Shutdown::Write)?;
            let mut rest = tokio::net::TcpStream::from_std(stream.try_clone()?)?;
            let mut sink = [0; 256];
            while rest.read(&mut sink).await? > 0 {}
            Ok::<_, anyhow::Error>(())
        };
        match tokio::time::timeout(GOODBYE, farewell).await {
            Ok(Ok(())) => {}
            Ok(Err(problem)) => tracing::debug!(connection = self.number, %problem, "farewell failed"),
            Err(_) => tracing::debug!(connection = self.number, "the broker does not close the connection"),
        }
    }
}

fn receive(mut stream: &TcpStream, publisher: &mut Publisher, now: Duration) -> anyhow::Result<()> {
    let mut buffer = [0; 8192];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => bail!("the broker closed the connection"),
            Ok(bytes) => {
                publisher.read(buffer.get(..bytes).unwrap_or_default(), now)?;
                if bytes < buffer.len() {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read from the broker"),
        }
    }
}

/// Whether the socket took everything.
fn send(mut stream: &TcpStream, publisher: &mut Publisher, now: Duration) -> anyhow::Result<bool> {
    while !publisher.to_write().is_empty() {
        match stream.write(publisher.to_write()) {
            Ok(0) => bail!("the socket takes no more"),
            Ok(bytes) => publisher.wrote(bytes, now),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("write to the broker"),
        }
    }
    Ok(true)
}

/// When the connection has something to do again. All connections tick with the same period, each at its own
/// place in it, so that the load on the broker is even.
fn wake(number: u32, shared: &Shared, publisher: &Publisher, blocked: bool, now: Duration) -> Duration {
    let fleet = &shared.settings.device_simulator;
    let unpaced = fleet.messages_per_second().is_none();
    if unpaced && fleet.qos == 0 && !blocked && publisher.next().is_some() {
        return now;
    }
    let tick = if unpaced || blocked { fleet.tick.min(UNPACED_TICK) } else { fleet.tick };
    // Silence is looked at a few times per keep-alive whatever happens; a broker may ask for a short one.
    let mut target = now + (shared.settings.mqtt.keep_alive / 8).min(SILENCE);
    if let Some(next) = publisher.next() {
        target = target.min(next);
    }
    if blocked || publisher.is_waiting() {
        target = target.min(now + tick);
    }
    on_grid(target.max(now), tick, tick * number / fleet.connections.max(1))
}

/// The first moment after `target` that is `place` within a period of `tick`.
fn on_grid(target: Duration, tick: Duration, place: Duration) -> Duration {
    let (target, tick, place) = (target.as_nanos(), tick.as_nanos().max(1), place.as_nanos());
    let periods = (target + tick - place) / tick;
    Duration::from_nanos(u64::try_from(periods * tick + place).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_is_always_ahead_and_keeps_places_apart() {
        let ms = Duration::from_millis;
        assert_eq!(on_grid(ms(100), ms(10), ms(3)), ms(103));
        assert_eq!(on_grid(ms(103), ms(10), ms(3)), ms(113));
        assert_eq!(on_grid(ms(104), ms(10), ms(3)), ms(113));
        assert_eq!(on_grid(ms(0), ms(10), ms(0)), ms(10));
        assert_eq!(on_grid(ms(1), ms(2), ms(1)), ms(3));
    }
}
