//! The bounded queue between a source and the writers.
//!
//! Bounded twice: by messages and by bytes. A source asks for room before it reads from its socket and so never
//! blocks with a message in hand; what does not fit stays with the broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Mutex, MutexGuard, Notify, mpsc};

use crate::delivery::Delivery;

/// How full the queue is. Counts messages taken from the broker and not yet settled by a writer, so that the bound
/// holds for everything a message occupies until its row is committed.
#[derive(Debug)]
pub struct Capacity {
    max_messages: usize,
    max_bytes: usize,
    messages: AtomicUsize,
    bytes: AtomicUsize,
    freed: Notify,
}

impl Capacity {
    #[must_use]
    pub fn messages(&self) -> usize {
        self.messages.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Messages and bytes at which the queue is full.
    #[must_use]
    pub fn bounds(&self) -> (usize, usize) {
        (self.max_messages, self.max_bytes)
    }

    /// Waits until everything taken from the broker is settled. For the source, when it reads nothing.
    pub async fn emptied(&self) {
        while self.messages() > 0 {
            self.freed.notified().await;
        }
    }

    fn has_room(&self) -> bool {
        self.messages() < self.max_messages && self.bytes() < self.max_bytes
    }

    fn add(&self, messages: usize, bytes: usize) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A writer has settled these: their room is free again.
    pub fn free(&self, messages: usize, bytes: usize) {
        self.messages.fetch_sub(messages, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.freed.notify_one();
    }
}

/// The source's end.
#[derive(Debug)]
pub struct Sender {
    sender: mpsc::UnboundedSender<Vec<Delivery>>,
    level: Arc<Capacity>,
}

/// The writers' end; shared by all writers, used by one at a time.
#[derive(Debug)]
pub struct Receiver<M> {
    receiver: Arc<Mutex<Intake<M>>>,
    level: Arc<Capacity>,
}

impl<M> Clone for Receiver<M> {
    fn clone(&self) -> Self {
        Self { receiver: self.receiver.clone(), level: self.level.clone() }
    }
}

/// What a writer holds while it fills a batch. The ticket is drawn under the same lock that takes the deliveries, so
/// tickets follow receipt order.
#[derive(Debug)]
pub struct Intake<M> {
    pub receiver: mpsc::UnboundedReceiver<Vec<Delivery>>,
    pub next_ticket: u64,
    /// What the decoder remembers of what all writers have taken.
    pub memory: M,
}

/// Makes a queue that holds at most about this many messages and bytes: the last chunk a source reads may go over by
/// its own size. `memory` is what the decoder remembers.
#[must_use]
#[allow(
    clippy::disallowed_methods,
    reason = "Capacity is the bound, in messages and in bytes; a channel counts only chunks"
)]
pub fn bounded<M>(max_messages: usize, max_bytes: usize, memory: M) -> (Sender, Receiver<M>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let level = Arc::new(Capacity {
        max_messages,
        max_bytes,
        messages: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        freed: Notify::new(),
    });
    let intake = Intake { receiver, next_ticket: 0, memory };
    (Sender { sender, level: level.clone() }, Receiver { receiver: Arc::new(Mutex::new(intake)), level })
}

impl Sender {
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.level.has_room()
    }

    /// Waits until there is room. Cancelling loses nothing.
    pub async fn room(&self) {
        while !self.level.has_room() {
            self.level.freed.notified().await;
        }
    }

    /// Hands a chunk in, without waiting. `false` when the writers are gone.
    pub fn send(&self, chunk: Vec<Delivery>) -> bool {
        self.level.add(chunk.len(), chunk.iter().map(Delivery::size).sum());
        self.sender.send(chunk).is_ok()
    }

    #[must_use]
    pub fn level(&self) -> Arc<Capacity> {
        self.level.clone()
    }
}

impl<M> Receiver<M> {
    /// Waits for its turn to take from the queue.
    pub async fn intake(&self) -> MutexGuard<'_, Intake<M>> {
        self.receiver.lock().await
    }

    #[must_use]
    pub fn level(&self) -> &Capacity {
        &self.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use tokio::time::Instant;

    fn delivery(bytes: usize) -> Delivery {
        Delivery::new(Bytes::new(), vec![0; bytes].into(), None, Instant::now())
    }

    #[tokio::test]
    async fn is_full_by_messages_or_by_bytes_until_a_writer_frees_it() {
        let (sender, receiver) = bounded(2, 10_000, ());
        sender.send(vec![delivery(1), delivery(1)]);
        assert!(!sender.has_room());
        receiver.level().free(1, delivery(1).size());
        sender.room().await;
        sender.send(vec![delivery(20_000)]);
        receiver.level().free(1, delivery(1).size());
        assert!(!sender.has_room(), "one message of 20,000 bytes fills it");
        receiver.level().free(1, delivery(20_000).size());
        assert!(sender.has_room());
        assert_eq!((receiver.level().messages(), receiver.level().bytes()), (0, 0));
    }
}
