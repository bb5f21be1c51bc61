//! A bound, in bytes, for what a connection holds of the broker's messages before anybody takes them.
//!
//! The AMQP client reads whatever the broker sends and queues it without a limit, and the broker's window (prefetch)
//! counts messages, not bytes. So the bound sits at the socket: while too much waits, nothing is read, and the rest
//! stays in the kernel's buffers and with the broker. Writing goes on, so acknowledgements are sent all the same.
//!
//! What waits is estimated from below when messages are taken (their framing is not counted) and set right whenever
//! nothing waits ([`Gate::taken_all`]). An estimate that is off therefore closes the gate too early, never too late,
//! and a message larger than the bound passes.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use async_rs::Tokio;
use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use futures_core::Stream;
use futures_io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;

use crate::legible::Legible;

/// Read at once: between two reads the client hands on what it has. More would be parsed in one go, with all the
/// properties of all its messages in memory.
const READ_BYTES: usize = 256 << 10;
/// Read from a closed gate at each [`Gate::trickle`]: enough to see that the broker lives, whatever is in front.
const TRICKLE_BYTES: usize = 4 << 10;

/// Shared by the connection's socket and whoever takes its messages.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max_bytes: u64,
    /// Read from the socket since the connection was opened.
    read: AtomicU64,
    /// Of these, taken by whoever works with the messages.
    taken: AtomicU64,
    closings: AtomicU64,
    /// Whoever reads stands before it.
    shut: AtomicBool,
    /// One small read is allowed although the gate is closed.
    trickle: AtomicBool,
    /// Nobody will take anything more.
    cut: AtomicBool,
    reader: Mutex<Option<Waker>>,
    closed: Notify,
}

impl Gate {
    /// For one connection, of which about this much may wait.
    #[must_use]
    pub fn new(max_bytes: u64) -> Self {
        Self(Arc::new(Inner {
            max_bytes,
            read: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            closings: AtomicU64::new(0),
            shut: AtomicBool::new(false),
            trickle: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            reader: Mutex::new(None),
            closed: Notify::new(),
        }))
    }

    /// Bytes read so far. Take this before looking whether anything waits, for [`Gate::taken_all`].
    #[must_use]
    pub fn read(&self) -> u64 {
        self.0.read.load(Ordering::Acquire)
    }

    /// Times it closed.
    #[must_use]
    pub fn closings(&self) -> u64 {
        self.0.closings.load(Ordering::Relaxed)
    }

    /// A message of so many bytes was taken.
    pub fn take(&self, bytes: usize) {
        let read = self.read();
        let taken = self.0.taken.load(Ordering::Relaxed).saturating_add(bytes as u64);
        self.set_taken(taken.min(read));
    }

    /// Of what had been read, nothing waits but `waiting` bytes.
    pub fn taken_all(&self, read: u64, waiting: usize) {
        self.set_taken(read.saturating_sub(waiting as u64));
    }

    fn set_taken(&self, taken: u64) {
        let before = self.0.taken.swap(taken, Ordering::AcqRel);
        if before != taken && self.is_open() {
            self.wake();
        }
    }

    /// Lets a little through although it is closed. A connection that reads nothing would take its broker for dead.
    pub fn trickle(&self) {
        if !self.is_open() {
            self.0.trickle.store(true, Ordering::Release);
            self.wake();
        }
    }

    /// Ends the connection at its next read. One that stood before a closed gate would never see its own end.
    pub fn cut(&self) {
        self.0.cut.store(true, Ordering::Release);
        self.wake();
    }

    /// Waits until it closes. At most one may wait.
    pub async fn closed(&self) {
        self.0.closed.notified().await;
    }

    #[must_use]
    pub fn is_open(&self) -> bool {
        self.read().saturating_sub(self.0.taken.load(Ordering::Acquire)) < self.0.max_bytes
    }

    fn wake(&self) {
        let reader = self.0.reader.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// How much may be read now; otherwise `cx` is woken later.
    fn poll_allowance(&self, cx: &Context<'_>) -> Poll<usize> {
        if self.is_open() {
            self.0.shut.store(false, Ordering::Relaxed);
            return Poll::Ready(READ_BYTES);
        }
        *self.0.reader.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        if self.0.trickle.swap(false, Ordering::AcqRel) {
            return Poll::Ready(TRICKLE_BYTES);
        }
        // It may have opened before the waker was there.
        if self.is_open() || self.0.cut.load(Ordering::Acquire) {
            return Poll::Ready(READ_BYTES);
        }
        if !self.0.shut.swap(true, Ordering::Relaxed) {
            self.0.closings.fetch_add(1, Ordering::Relaxed);
        }
        self.0.closed.notify_one();
        Poll::Pending
    }
}

/// A socket that is read only while its gate is open, and hands on what the client can read.
#[derive(Debug)]
pub(crate) struct Gated<S> {
    inner: S,
    gate: Gate,
    legible: Legible,
    /// Bytes read since the client last had a chance to work on them.
    burst: usize,
}

impl<S: AsyncRead + Unpin> AsyncRead for Gated<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.gate.0.cut.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let waited = this.legible.give(buf);
        if waited > 0 {
            return Poll::Ready(Ok(waited));
        }
        loop {
            if this.burst >= READ_BYTES {
                this.burst = 0;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let allowed = ready!(this.gate.poll_allowance(cx)).min(buf.len());
            let to = buf.get_mut(..allowed).unwrap_or_default();
            let Poll::Ready(outcome) = Pin::new(&mut this.inner).poll_read(cx, to) else {
                this.burst = 0;
                return Poll::Pending;
            };
            let bytes = match outcome {
                Ok(bytes @ 1..) => bytes,
                ended => return Poll::Ready(ended),
            };
            this.burst += bytes;
            this.gate.0.read.fetch_add(bytes as u64, Ordering::AcqRel);
            this.legible.take(to.get(..bytes).unwrap_or_default());
            let legible = this.legible.give(buf);
            if legible > 0 {
                return Poll::Ready(Ok(legible));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gated<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_close(cx)
    }
}

/// Tokio's reactor, with sockets behind a gate.
#[derive(Debug, Clone)]
pub(crate) struct GatedReactor {
    tokio: Tokio,
    gate: Gate,
}

/// What lapin runs on: Tokio, with such sockets.
pub(crate) type GatedKit = RuntimeParts<Tokio, GatedReactor>;

/// For one connection, within a Tokio runtime.
#[must_use]
pub(crate) fn kit(gate: Gate) -> GatedKit {
    let tokio = Tokio::current();
    RuntimeParts::new(tokio.clone(), GatedReactor { tokio, gate })
}

impl Reactor for GatedReactor {
    type TcpStream = Gated<<Tokio as Reactor>::TcpStream>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::Error::other("only connections of our own go through a gate"))
    }

    fn sleep(&self, dur: Duration) -> Self::Sleep {
        self.tokio.sleep(dur)
    }

    fn interval(&self, dur: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.tokio.interval(dur)
    }

    fn tcp_connect_addr(
        &self,
        addr: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let gate = self.gate.clone();
        let connecting = self.tokio.tcp_connect_addr(addr);
        async move { Ok(Gated { inner: connecting.await?, gate, legible: Legible::default(), burst: 0 }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A peer that always has more.
    struct Endless;

    impl AsyncRead for Endless {
        fn poll_read(self: Pin<&mut Self>, _cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
            buf.fill(1);
            Poll::Ready(Ok(buf.len()))
        }
    }

    fn read(socket: &mut Gated<Endless>, waker: &Waker) -> Option<usize> {
        let mut buf = vec![0; 1 << 20];
        match Pin::new(socket).poll_read(&mut Context::from_waker(waker), &mut buf) {
            Poll::Ready(outcome) => Some(outcome.unwrap()),
            Poll::Pending => None,
        }
    }

    /// Reads until nothing is allowed twice in a row: once is only the pause between two bursts.
    fn read_all(socket: &mut Gated<Endless>, waker: &Waker) -> usize {
        let (mut bytes, mut refused) = (0, 0);
        while refused < 2 {
            match read(socket, waker) {
                Some(more) => (bytes, refused) = (bytes + more, 0),
                None => refused += 1,
            }
        }
        bytes
    }

    #[test]
    fn reads_no_more_than_its_bound_and_a_burst_and_goes_on_when_something_is_taken() {
        let gate = Gate::new(1 << 20);
        let mut socket = Gated { inner: Endless, gate: gate.clone(), legible: Legible::default(), burst: 0 };
        let count = Arc::new(Count::default());
        let waker = Waker::from(count.clone());
        let bytes = read_all(&mut socket, &waker);
        assert!((1 << 20..(1 << 20) + READ_BYTES).contains(&bytes), "{bytes}");
        assert!(!gate.is_open());
        let woken = count.0.load(Ordering::Relaxed);
        gate.take(READ_BYTES);
        assert_eq!(count.0.load(Ordering::Relaxed), woken + 1, "the reader is woken");
        assert_eq!(read_all(&mut socket, &waker), READ_BYTES);
        gate.taken_all(gate.read(), 0);
        assert!(read_all(&mut socket, &waker) >= 1 << 20);
    }

    #[test]
    fn a_message_larger_than_the_bound_passes_when_nothing_else_waits() {
        let gate = Gate::new(1 << 20);
        let mut socket = Gated { inner: Endless, gate: gate.clone(), legible: Legible::default(), burst: 0 };
        let waker = Waker::noop();
        let mut bytes = 0;
        while bytes < 10 << 20 {
            bytes += read_all(&mut socket, waker);
            // Nothing is complete yet, so nothing waits.
            gate.taken_all(gate.read(), 0);
        }
        // Its own size, when it is taken at last, is not counted a second time.
        gate.take(10 << 20);
        let more = read_all(&mut socket, waker);
        assert!(more <= (1 << 20) + READ_BYTES, "{more}");
    }

    #[test]
    fn a_closed_gate_lets_a_little_through_when_asked() {
        let gate = Gate::new(1 << 20);
        let mut socket = Gated { inner: Endless, gate: gate.clone(), legible: Legible::default(), burst: 0 };
        let waker = Waker::noop();
        read_all(&mut socket, waker);
        gate.trickle();
        assert_eq!(read_all(&mut socket, waker), TRICKLE_BYTES);
        assert_eq!(read_all(&mut socket, waker), 0);
        assert_eq!(gate.closings(), 1, "it has not been open since");
        gate.taken_all(gate.read(), 0);
        read_all(&mut socket, waker);
        assert_eq!(gate.closings(), 2);
    }
}
