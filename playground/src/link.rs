//! A piece of network between two parties that can be cut, slowed and restored.
//!
//! While it is cut nothing is forwarded in either direction, nobody is told, open connections stay open, and new ones
//! are accepted and hang. Nothing is lost or reordered inside a connection that goes on afterwards: TCP would have
//! repeated those bytes. Memory is bounded: one buffer per direction, a limited number of connections.
//!
//! A forwarder and not a network namespace with a packet filter: it needs no root, so everybody's `make test` has it,
//! and it is the harder case. With dropped packets the kernel at least stops acknowledging, and TCP keep-alive or
//! `tcp_user_timeout` ends the connection after seconds. Here the forwarder's kernel goes on acknowledging, as a hung
//! proxy or a frozen machine behind a load balancer does: only what a program itself waits for with a timeout helps.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::port::Port;

/// Per direction of a connection.
const BUFFER: usize = 64 << 10;
/// Those beyond wait in the kernel until one ends. A client that tries again each second fills it in 17 minutes of cut.
const MAX_CONNECTIONS: usize = 1024;
/// A slow link forwards a piece of this length in time, then the next.
const SLOW_PIECES_PER_SECOND: u32 = 20;

/// What happens to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Open,
    Slow { bytes_per_second: u32 },
    Cut,
}

/// What becomes of the connections that a cut met, when the network is back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum After {
    /// They go on where they were, as after a short partition. Those accepted meanwhile are served too, late: a
    /// CONNECT that its sender gave up long ago arrives all the same.
    #[default]
    Continue,
    /// They are reset, as by a firewall that has forgotten them.
    Reset,
}

#[derive(Debug, Clone, Copy)]
struct State {
    flow: Flow,
    /// Connections of an earlier epoch are reset.
    epoch: u64,
}

#[derive(Debug, Default)]
struct Counts {
    forwarded: AtomicU64,
    accepted: AtomicUsize,
}

/// Forwards its port to another one on 127.0.0.1. Dropping it closes every connection.
#[derive(Debug)]
pub struct Link {
    port: Port,
    state: watch::Sender<State>,
    counts: Arc<Counts>,
    _acceptor: JoinSet<()>,
}

impl Link {
    /// A link that forwards everything to `upstream`; the server there need not run yet.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn open(upstream: u16) -> anyhow::Result<Self> {
        let port = Port::free()?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port.number()))
            .await
            .with_context(|| format!("listen on {}", port.number()))?;
        let (state, receiver) = watch::channel(State { flow: Flow::Open, epoch: 0 });
        let counts = Arc::new(Counts::default());
        let mut acceptor = JoinSet::new();
        acceptor.spawn(accept(listener, upstream, receiver, counts.clone()));
        Ok(Self { port, state, counts, _acceptor: acceptor })
    }

    /// Where clients connect instead of to the server.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// From now on nothing passes.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.flow = Flow::Cut);
    }

    /// From now on this much passes per second, in each direction of each connection.
    pub fn slow(&self, bytes_per_second: u32) {
        let flow = Flow::Slow { bytes_per_second: bytes_per_second.max(1) };
        self.state.send_modify(|state| state.flow = flow);
    }

    /// From now on everything passes.
    pub fn restore(&self, after: After) {
        self.state.send_modify(|state| {
            state.flow = Flow::Open;
            state.epoch += u64::from(after == After::Reset);
        });
    }

    /// Bytes forwarded since it was opened, both directions.
    #[must_use]
    pub fn forwarded(&self) -> u64 {
        self.counts.forwarded.load(Ordering::Relaxed)
    }

    /// Connections accepted since it was opened.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.counts.accepted.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, upstream: u16, state: watch::Receiver<State>, counts: Arc<Counts>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
        }
        match listener.accept().await {
            Ok((client, _)) => {
                counts.accepted.fetch_add(1, Ordering::Relaxed);
                connections.spawn(serve(client, upstream, state.clone(), counts.clone()));
            }
            Err(error) => {
                // Out of file descriptors: those of connections that end come free.
                tracing::warn!(%error, "a link cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One connection until an end closes it or the link resets it.
async fn serve(mut client: TcpStream, upstream: u16, state: watch::Receiver<State>, counts: Arc<Counts>) {
    let mut server = None;
    let epoch = state.borrow().epoch;
    let mut resets = state.clone();
    let outcome = tokio::select! {
        _ = resets.wait_for(|state| state.epoch != epoch) => Err(io::ErrorKind::ConnectionReset.into()),
        outcome = forward(&mut client, &mut server, upstream, state, &counts) => outcome,
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, upstream, "a connection through a link is reset");
        for end in [Some(client), server].into_iter().flatten() {
            if let Err(error) = end.set_zero_linger() {
                tracing::debug!(%error, "closed in order instead of reset");
            }
        }
    }
}

async fn forward(
    client: &mut TcpStream,
    server: &mut Option<TcpStream>,
    upstream: u16,
    mut state: watch::Receiver<State>,
    counts: &Counts,
) -> io::Result<()> {
    passable(&mut state).await?;
    let server = server.insert(TcpStream::connect((Ipv4Addr::LOCALHOST, upstream)).await?);
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    tokio::try_join!(
        pump(from_client, to_server, state.clone(), counts),
        pump(from_server, to_client, state, counts)
    )?;
    Ok(())
}

/// One direction. A cut takes hold at once, also in the middle of a read or write; reads and writes that it
/// interrupts have moved nothing.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut state: watch::Receiver<State>,
    counts: &Counts,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let flow = passable(&mut state).await?;
        let wanted = match flow {
            Flow::Slow { bytes_per_second } => {
                BUFFER.min((bytes_per_second / SLOW_PIECES_PER_SECOND).max(1) as usize)
            }
            Flow::Open | Flow::Cut => BUFFER,
        };
        let piece = buffer.get_mut(..wanted).unwrap_or_default();
        let count = tokio::select! {
            biased;
            changed = state.changed() => { changed.map_err(gone)?; continue }
            count = from.read(piece) => count?,
        };
        if count == 0 {
            return to.shutdown().await;
        }
        let mut rest = buffer.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            passable(&mut state).await?;
            let written = tokio::select! {
                biased;
                changed = state.changed() => { changed.map_err(gone)?; continue }
                written = to.write(rest) => written?,
            };
            counts.forwarded.fetch_add(written as u64, Ordering::Relaxed);
            rest = rest.get(written..).unwrap_or_default();
        }
        if let Flow::Slow { bytes_per_second } = flow {
            let pause = Duration::from_secs_f64(count as f64 / f64::from(bytes_per_second));
            tokio::time::sleep(pause).await;
        }
    }
}

/// Waits until bytes may pass.
async fn passable(state: &mut watch::Receiver<State>) -> io::Result<Flow> {
    Ok(state.wait_for(|state| state.flow != Flow::Cut).await.map_err(gone)?.flow)
}

fn gone(_: watch::error::RecvError) -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};

    use super::*;

    const SOON: Duration = Duration::from_secs(60);
    const NOTHING: Duration = Duration::from_millis(200);

    /// A server that sends back what it gets, and a link to it.
    async fn echo() -> (Link, JoinSet<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let link = Link::open(listener.local_addr().unwrap().port()).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                connections.spawn(async move {
                    let (mut from, mut to) = stream.split();
                    drop(tokio::io::copy(&mut from, &mut to).await);
                });
            }
        });
        (link, tasks)
    }

    async fn client(link: &Link) -> TcpStream {
        timeout(SOON, TcpStream::connect((Ipv4Addr::LOCALHOST, link.port()))).await.unwrap().unwrap()
    }

    async fn expect(stream: &mut TcpStream, text: &[u8]) {
        let mut answer = vec![0; text.len()];
        timeout(SOON, stream.read_exact(&mut answer)).await.expect("an answer").unwrap();
        assert_eq!(answer, text);
    }

    async fn expect_nothing(stream: &mut TcpStream) {
        assert!(timeout(NOTHING, stream.read(&mut [0; 1])).await.is_err(), "something passed a cut");
    }

    #[tokio::test]
    async fn a_cut_holds_everything_and_nothing_is_lost_when_it_continues() {
        let (link, _server) = echo().await;
        let mut old = client(&link).await;
        old.write_all(b"one").await.unwrap();
        expect(&mut old, b"one").await;
        link.cut();
        let forwarded = link.forwarded();
        old.write_all(b"two").await.unwrap();
        let mut new = client(&link).await;
        new.write_all(b"three").await.unwrap();
        expect_nothing(&mut old).await;
        expect_nothing(&mut new).await;
        assert_eq!((link.forwarded(), link.accepted()), (forwarded, 2));
        link.restore(After::Continue);
        expect(&mut old, b"two").await;
        expect(&mut new, b"three").await;
    }

    #[tokio::test]
    async fn a_reset_ends_what_the_cut_met_and_serves_what_comes_after() {
        let (link, _server) = echo().await;
        let mut old = client(&link).await;
        old.write_all(b"one").await.unwrap();
        expect(&mut old, b"one").await;
        link.cut();
        old.write_all(b"two").await.unwrap();
        let mut hung = client(&link).await;
        expect_nothing(&mut hung).await;
        link.restore(After::Reset);
        for stream in [&mut old, &mut hung] {
            let error = timeout(SOON, stream.read(&mut [0; 1])).await.expect("told").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        let mut new = client(&link).await;
        new.write_all(b"three").await.unwrap();
        expect(&mut new, b"three").await;
    }

    #[tokio::test]
    async fn a_slow_link_passes_what_it_is_told_to() {
        let (link, _server) = echo().await;
        let mut stream = client(&link).await;
        link.slow(100_000);
        let payload = vec![7; 50_000];
        let started = Instant::now();
        stream.write_all(&payload).await.unwrap();
        expect(&mut stream, &payload).await;
        let elapsed = started.elapsed();
        assert!(elapsed > Duration::from_millis(400), "half a second's worth took {elapsed:?}");
        link.restore(After::Continue);
        stream.write_all(&payload).await.unwrap();
        expect(&mut stream, &payload).await;
    }

    #[tokio::test]
    async fn the_end_of_one_side_reaches_the_other() {
        let (link, mut server) = echo().await;
        let mut stream = client(&link).await;
        stream.write_all(b"last words").await.unwrap();
        stream.shutdown().await.unwrap();
        expect(&mut stream, b"last words").await;
        assert_eq!(timeout(SOON, stream.read(&mut [0; 1])).await.expect("the end").unwrap(), 0);
        server.shutdown().await;
        let mut refused = client(&link).await;
        let outcome = timeout(SOON, refused.read(&mut [0; 1])).await.expect("told that nobody listens");
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
