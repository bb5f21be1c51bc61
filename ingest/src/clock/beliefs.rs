//! What the clocks say and what follows from it. Pure: every time is an argument.
//!
//! A clock is kept as its distance from the monotonic clock, so that it goes on between two looks. Microseconds.

use crate::partitions::Span;

/// Readings that confirm or refute a time are weighed in groups of at least this many.
const HEARD_AT_ONCE: usize = 20;
/// A live reading is at most this far from the present.
const LIVE_US: i64 = 60_000_000;

/// What is accepted, seen from one clock, and how far two may be apart.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub retention_us: i64,
    pub tolerance_us: i64,
    pub max_offset_us: i64,
}

/// Whether the time is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The primary has not been asked yet.
    Unknown,
    /// The clocks agree, with one another and with what they said before.
    Agreed,
    /// This machine's clock and the primary's agree, but both have jumped, or the stored readings are of another time.
    /// Live readings will tell.
    Doubted,
    /// This machine's clock and the primary's are too far apart.
    Apart,
}

#[derive(Debug)]
pub struct Beliefs {
    limits: Limits,
    /// The primary's clock as last measured.
    primary: Option<i64>,
    /// Half the round trip of that measurement: it may be off by so much.
    error_us: i64,
    /// What both clocks said when they last agreed.
    agreed: Option<i64>,
    /// Clocks that were believed once and may still be right: the least and the greatest.
    doubt: Option<Span>,
    /// Readings since the last group was weighed: of the present, and all.
    live: usize,
    heard: usize,
}

impl Beliefs {
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, primary: None, error_us: 0, agreed: None, doubt: None, live: 0, heard: 0 }
    }

    /// The primary's clock showed `primary_us` between the two monotonic times; this machine's showed `own_us` at the second.
    pub fn measured(&mut self, primary_us: i64, (sent, received): (i64, i64), own_us: i64) {
        self.error_us = (received - sent) / 2;
        let primary = primary_us - (sent + self.error_us);
        self.primary = Some(primary);
        if self.far(primary, own_us - received) {
            return;
        }
        if let Some(agreed) = self.agreed.filter(|agreed| self.far(*agreed, primary)) {
            // Both have jumped at once.
            self.doubt_of((agreed, agreed));
        }
        self.agreed = Some(primary);
    }

    /// Before anything was judged: the newest reading that is stored is of this time.
    pub fn remember_stored(&mut self, stored_us: i64, own_us: i64, at: i64) {
        let now = self.now(own_us, at);
        let stored = stored_us - at;
        if stored_us < now - self.limits.retention_us / 2 {
            // Nothing was sent for long, or the clocks are ahead.
            self.doubt_of((stored, stored));
        } else if stored_us > now + self.limits.tolerance_us + self.limits.max_offset_us {
            // The clocks are behind, nobody knows by how much more than this.
            self.doubt_of((stored, stored.saturating_add(self.limits.retention_us)));
        }
    }

    fn doubt_of(&mut self, (low, high): Span) {
        let (least, greatest) = self.doubt.unwrap_or((low, high));
        self.doubt = Some((low.min(least), high.max(greatest)));
        (self.live, self.heard) = (0, 0);
    }

    /// A reading of this time has been stored. When most of those that come are of the present, the clocks are right.
    pub fn heard(&mut self, time_us: i64, own_us: i64, at: i64) {
        if self.state(own_us, at) != State::Doubted {
            return;
        }
        self.heard += 1;
        if (time_us - self.now(own_us, at)).abs() <= LIVE_US {
            self.live += 1;
        }
        if self.heard >= HEARD_AT_ONCE {
            if self.live * 2 > self.heard {
                self.doubt = None;
            }
            (self.live, self.heard) = (0, 0);
        }
    }

    #[must_use]
    pub fn in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    #[must_use]
    pub fn state(&self, own_us: i64, at: i64) -> State {
        match self.primary {
            None => State::Unknown,
            Some(primary) if self.far(primary, own_us - at) => State::Apart,
            Some(_) if self.doubt.is_some() => State::Doubted,
            Some(_) => State::Agreed,
        }
    }

    /// The primary's clock, `None` before it was asked.
    #[must_use]
    pub fn primary(&self, at: i64) -> Option<i64> {
        self.primary.map(|primary| primary + at)
    }

    /// The time that counts: the primary's.
    #[must_use]
    pub fn now(&self, own_us: i64, at: i64) -> i64 {
        self.primary(at).unwrap_or(own_us)
    }

    /// Every time that it may be.
    #[must_use]
    pub fn possible(&self, own_us: i64, at: i64) -> Vec<i64> {
        let now = self.now(own_us, at);
        if self.state(own_us, at) == State::Agreed {
            return vec![now];
        }
        let doubt = self.doubt.into_iter().flat_map(|(low, high)| [low, high]);
        let mut others: Vec<i64> = self.agreed.into_iter().chain(doubt).map(|clock| clock + at).collect();
        others.extend([now, own_us]);
        others.sort_unstable();
        others.dedup_by(|a, b| (*a - *b).abs() <= self.limits.max_offset_us);
        others
    }

    /// Oldest and newest accepted time: what any clock accepts that may be right.
    #[must_use]
    pub fn window(&self, own_us: i64, at: i64) -> Span {
        let now = self.now(own_us, at);
        let (mut low, mut high) = (now, now);
        if self.state(own_us, at) != State::Agreed {
            let doubt = self.doubt.into_iter().flat_map(|(low, high)| [low, high]);
            let others = self.agreed.into_iter().chain(doubt).map(|clock| clock + at);
            for time in others.chain([own_us]) {
                low = low.min(time);
                high = high.max(time);
            }
        }
        (low.saturating_sub(self.limits.retention_us), high.saturating_add(self.limits.tolerance_us))
    }

    fn far(&self, a: i64, b: i64) -> bool {
        a.saturating_sub(b).saturating_abs() > self.limits.max_offset_us + self.error_us
    }
}

#[cfg(test)]
mod tests;
