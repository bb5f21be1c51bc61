//! How many dead letters one device may leave: whoever holds one device's password must not fill the disk.
//!
//! Each device has two allowances that refill over an hour: one of letters and bytes for what is no reading, one of bytes alone for
//! good readings that found no place ([`Origin`]). What is above them is acknowledged and counted, and not stored.
//!
//! An allowance is asked once for each part of a message ([`Admissions`]), however often the message is tried.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::dead_letter::Reason;

/// An allowance refills within this time.
const REFILL: Duration = Duration::from_secs(3600);
/// Devices with an allowance of their own at once; about 100 bytes each. Those beyond share one.
const MAX_DEVICES: usize = 100_000;
/// Between two searches for devices whose allowance is full again; each looks at all of them.
const SWEEP: Duration = Duration::from_secs(60);

/// What a letter is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Not a reading.
    Junk,
    /// A reading that is as it should be, but for its time or for what the table says. A device whose clock is wrong, or has
    /// whole seconds, sends many; nothing else holds what they say.
    Reading,
}

impl Origin {
    /// Of what is refused when it is decoded.
    #[must_use]
    pub fn of(reason: Reason) -> Self {
        match reason {
            Reason::TimestampOutOfRange | Reason::Conflict => Self::Reading,
            _ => Self::Junk,
        }
    }
}

/// What was decided about the letters of one message. It stays with the message, so that one that is tried again, or
/// decoded again, costs its device once.
#[derive(Debug, Default)]
pub struct Admissions {
    /// Parts that were refused when the message was last decoded.
    pub(crate) parts: usize,
    /// One of their letters holds the message as a whole.
    pub(crate) whole: bool,
    /// By where a part begins in the payload.
    decided: HashMap<(Origin, usize), bool>,
}

impl Admissions {
    pub(crate) fn get(&self, origin: Origin, place: usize) -> Option<bool> {
        self.decided.get(&(origin, place)).copied()
    }

    /// Decides unless it is decided.
    pub(crate) fn decide(&mut self, origin: Origin, place: usize, decide: impl FnOnce() -> bool) -> bool {
        *self.decided.entry((origin, place)).or_insert_with(decide)
    }

    /// Whether some of it has a letter.
    pub(crate) fn has_admitted(&self) -> bool {
        self.decided.values().any(|admitted| *admitted)
    }

    /// Forgets what was refused, and not what was decided.
    pub(crate) fn restart(&mut self) {
        self.parts = 0;
        self.whole = false;
    }

    /// As after `newer`, in which the message was decoded again.
    pub(crate) fn update(&mut self, newer: Self) {
        self.parts = newer.parts;
        self.whole = newer.whole;
        self.decided.extend(newer.decided);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.parts == 0 && self.decided.is_empty()
    }
}

/// Shared by all writers of a queue. Clones are the same.
#[derive(Debug, Clone)]
pub struct LetterLimit {
    junk: Arc<Mutex<Allowances>>,
    readings: Arc<Mutex<Allowances>>,
}

#[derive(Debug)]
struct Allowances {
    max_letters: f64,
    max_bytes: f64,
    devices: HashMap<Bytes, Allowance>,
    others: Allowance,
    /// When devices with a full allowance were last looked for.
    swept: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Allowance {
    letters: f64,
    bytes: f64,
    at: Instant,
}

impl LetterLimit {
    /// Letters for one device in an hour, and bytes of letters; readings are limited by their bytes alone.
    #[must_use]
    pub fn new(letters: u32, bytes: u64) -> Self {
        let allowances = |letters| Arc::new(Mutex::new(Allowances::new(f64::from(letters), bytes as f64)));
        // A letter weighs more than a hundred bytes: there is no end to their number but that of the bytes.
        Self { junk: allowances(letters), readings: allowances(u32::MAX) }
    }

    /// Whether the device of this topic may leave one more letter of this weight. Takes it from its allowance.
    #[must_use]
    pub fn admit(&self, origin: Origin, topic: &Bytes, weight: usize) -> bool {
        let allowances = match origin {
            Origin::Junk => &self.junk,
            Origin::Reading => &self.readings,
        };
        allowances.lock().unwrap_or_else(PoisonError::into_inner).admit(topic, weight)
    }
}

impl Allowances {
    fn new(max_letters: f64, max_bytes: f64) -> Self {
        let now = Instant::now();
        let others = Allowance { letters: max_letters, bytes: max_bytes, at: now };
        Self { max_letters, max_bytes, devices: HashMap::new(), others, swept: now }
    }

    fn admit(&mut self, topic: &Bytes, weight: usize) -> bool {
        let now = Instant::now();
        let Self { max_letters, max_bytes, devices, others, swept } = self;
        let (max_letters, max_bytes) = (*max_letters, *max_bytes);
        let device = device_of(topic);
        if devices.len() >= MAX_DEVICES && now - *swept >= SWEEP {
            *swept = now;
            // A device whose allowance is full again needs no entry.
            devices.retain(|_, allowance| now - allowance.at < REFILL);
        }
        let allowance = if devices.len() >= MAX_DEVICES {
            devices.get_mut(&device).unwrap_or(others)
        } else {
            devices.entry(device).or_insert(Allowance { letters: max_letters, bytes: max_bytes, at: now })
        };
        let refilled = (now - allowance.at).as_secs_f64() / REFILL.as_secs_f64();
        allowance.letters = (allowance.letters + refilled * max_letters).min(max_letters);
        allowance.bytes = (allowance.bytes + refilled * max_bytes).min(max_bytes);
        allowance.at = now;
        let weight = weight as f64;
        if allowance.letters < 1.0 || allowance.bytes < weight {
            return false;
        }
        allowance.letters -= 1.0;
        allowance.bytes -= weight;
        true
    }
}

/// The last level of a topic, as bytes of its own: the allowance must not hold a packet's memory. A broker that lets each
/// device publish below its own id only makes this the device that has logged in.
fn device_of(topic: &Bytes) -> Bytes {
    const LONGEST: usize = 256;
    let last = topic.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    Bytes::copy_from_slice(last.get(..LONGEST).unwrap_or(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(device: &str) -> Bytes {
        Bytes::from(format!("og/field/S/turbine/{device}"))
    }

    #[tokio::test(start_paused = true)]
    async fn an_allowance_is_of_one_device_and_refills() {
        let limit = LetterLimit::new(2, 1000);
        assert!(limit.admit(Origin::Junk, &topic("a"), 10) && limit.admit(Origin::Junk, &topic("a"), 10));
        assert!(!limit.admit(Origin::Junk, &topic("a"), 10), "two letters in an hour");
        assert!(
            (0..100).all(|_| limit.admit(Origin::Reading, &topic("a"), 10)),
            "a thousand bytes of readings"
        );
        assert!(!limit.admit(Origin::Reading, &topic("a"), 10));
        assert!(limit.admit(Origin::Junk, &topic("b"), 900));
        assert!(!limit.admit(Origin::Junk, &topic("b"), 200), "a thousand bytes in an hour");
        tokio::time::advance(REFILL / 2).await;
        assert!(limit.admit(Origin::Junk, &topic("a"), 10));
        assert!(!limit.admit(Origin::Junk, &topic("a"), 10));
        assert!(limit.admit(Origin::Junk, &topic("b"), 200));
    }

    #[tokio::test(start_paused = true)]
    async fn made_up_devices_share_what_is_left() {
        let limit = LetterLimit::new(1, 1000);
        let admitted =
            (0..2 * MAX_DEVICES).filter(|n| limit.admit(Origin::Junk, &topic(&n.to_string()), 1)).count();
        assert_eq!(admitted, MAX_DEVICES + 1);
        assert_eq!(limit.junk.lock().unwrap().devices.len(), MAX_DEVICES);
        tokio::time::advance(REFILL).await;
        assert!(limit.admit(Origin::Junk, &topic("new"), 1));
    }
}
