//! Between us and a real Postgres: makes the server abort the transaction in the tail of a COPY, after its count.
//!
//! A statement timeout that fires there does the same, but not when a test wants it. A failing query is put between the end
//! of the COPY and whatever follows; its error takes the place of the COPY's "ready for the next query". So the client
//! sees `COPY n`, an error, ready, and the transaction has failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

pub(crate) struct AbortingProxy {
    pub(crate) port: u16,
    /// COPYs that are still to be aborted.
    remaining: Arc<AtomicUsize>,
    /// From clients to the server.
    sent: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl AbortingProxy {
    /// Listens; passes everything on to `upstream` until COPYs are to be aborted.
    pub(crate) async fn new(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let remaining = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let armed = remaining.clone();
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = sent.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(("127.0.0.1", upstream)).await.unwrap();
                for stream in [&client, &server] {
                    stream.set_nodelay(true).unwrap();
                }
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let skip = Arc::new(AtomicBool::new(false));
                connections.spawn(forward_requests(
                    from_client,
                    to_server,
                    armed.clone(),
                    skip.clone(),
                    counted.clone(),
                ));
                connections.spawn(forward_answers(from_server, to_client, skip));
            }
        });
        Self { port, remaining, sent, _tasks: tasks }
    }

    pub(crate) fn abort_copies(&self, count: usize) {
        self.remaining.store(count, Ordering::SeqCst);
    }

    /// Bytes that clients have sent so far.
    pub(crate) fn bytes_sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }

    /// Whether all that were to be aborted are.
    pub(crate) fn is_done(&self) -> bool {
        self.remaining.load(Ordering::SeqCst) == 0
    }
}

/// `None` at the end of the stream.
async fn message(from: &mut OwnedReadHalf, has_type: bool) -> Option<Vec<u8>> {
    let mut head = vec![0; if has_type { 5 } else { 4 }];
    from.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes(head[head.len() - 4..].try_into().unwrap()) as usize;
    let start = head.len();
    head.resize(start + length - 4, 0);
    from.read_exact(&mut head[start..]).await.ok()?;
    Some(head)
}

async fn forward_requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    remaining: Arc<AtomicUsize>,
    skip: Arc<AtomicBool>,
    sent: Arc<AtomicUsize>,
) {
    let mut has_type = false;
    let mut copy_done = false;
    while let Some(mut bytes) = message(&mut from, has_type).await {
        if has_type && bytes[0] == b'c' {
            copy_done = true;
        } else if has_type && bytes[0] == b'S' && std::mem::take(&mut copy_done) {
            let take = |count: usize| count.checked_sub(1);
            if remaining.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
                skip.store(true, Ordering::SeqCst);
                let query = b"DO $$ BEGIN RAISE EXCEPTION 'timeout' USING ERRCODE = '57014'; END $$\0";
                bytes.push(b'Q');
                bytes.extend((query.len() as u32 + 4).to_be_bytes());
                bytes.extend(query);
            }
        }
        has_type = true;
        sent.fetch_add(bytes.len(), Ordering::SeqCst);
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn forward_answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, skip: Arc<AtomicBool>) {
    while let Some(bytes) = message(&mut from, true).await {
        if bytes[0] == b'Z' && skip.swap(false, Ordering::SeqCst) {
            continue;
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
