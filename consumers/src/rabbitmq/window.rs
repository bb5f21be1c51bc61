//! How many messages the broker may have outstanding towards us.
//!
//! The broker counts messages, memory counts bytes. So the window follows the size of what comes: it aims at a number of
//! bytes and begins small, since nobody knows what waits in the queue. A burst of larger messages than before still
//! comes in the old window; the gate at the socket bounds that.

/// Before anything is known. Of messages as large as ours may be (512 KiB) it is 128 MiB, which the broker holds too.
const FIRST: u16 = 256;
/// However large they are, so that writers have something to do while one message travels.
const LEAST: u16 = 4;
/// How slowly the average follows: a few messages of another size change nothing.
const WEIGHT: f64 = 1.0 / 64.0;
/// A change costs a round trip in which nothing comes.
const MESSAGES_BETWEEN_CHANGES: u32 = 64;

/// The window of one consumer.
#[derive(Debug)]
pub struct Window {
    most: u16,
    bytes: f64,
    now: u16,
    average: f64,
    seen: u32,
}

impl Window {
    /// At most `most` messages, and about `bytes`.
    #[must_use]
    pub fn new(most: u16, bytes: u64) -> Self {
        Self { most, bytes: bytes as f64, now: FIRST.min(most), average: 0.0, seen: 0 }
    }

    /// In messages.
    #[must_use]
    pub fn now(&self) -> u16 {
        self.now
    }

    /// A message of so many bytes has come.
    pub fn saw(&mut self, bytes: usize) {
        let bytes = bytes as f64;
        self.average = if self.seen == 0 && self.average == 0.0 {
            bytes
        } else {
            self.average + (bytes - self.average) * WEIGHT
        };
        self.seen = self.seen.saturating_add(1);
    }

    /// Moves to another size when what came asks for one that is much different.
    pub fn change(&mut self) -> Option<u16> {
        if self.seen < MESSAGES_BETWEEN_CHANGES.min(self.now.into()) {
            return None;
        }
        // The cast saturates: messages without a byte ask for the most.
        let wanted = ((self.bytes / self.average.max(1.0)) as u16).max(LEAST).min(self.most);
        let smaller = wanted <= self.now / 2;
        let larger = wanted / 2 >= self.now || (wanted == self.most && self.now < self.most);
        if !smaller && !larger {
            return None;
        }
        self.now = wanted;
        self.seen = 1;
        Some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(window: &mut Window, messages: usize, bytes: usize) -> u16 {
        for _ in 0..messages {
            window.saw(bytes);
            window.change();
        }
        window.now()
    }

    #[test]
    fn grows_for_small_messages_and_shrinks_for_large_ones() {
        let mut window = Window::new(5000, 32 << 20);
        assert_eq!(window.now(), 256);
        assert_eq!(after(&mut window, 64, 300), 5000, "small ones: all that is allowed, after one change");
        let large = after(&mut window, 1000, 512 << 10);
        assert!((64..=128).contains(&large), "{large}");
        assert_eq!(after(&mut window, 2000, 300), 5000);
        assert_eq!(after(&mut window, 500, 128 << 20), LEAST, "never none");
    }

    #[test]
    fn a_few_large_messages_among_many_small_ones_change_little() {
        let mut window = Window::new(5000, 32 << 20);
        after(&mut window, 300, 300);
        assert_eq!(after(&mut window, 1, 128 << 10), 5000);
    }

    #[test]
    fn never_more_than_is_allowed() {
        let mut window = Window::new(10, 32 << 20);
        assert_eq!((window.now(), after(&mut window, 500, 0)), (10, 10));
        let mut window = Window::new(1, 32 << 20);
        assert_eq!(after(&mut window, 500, 512 << 10), 1);
    }
}
