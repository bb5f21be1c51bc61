//! When a batch is what the database fails on, and not an outage.
//!
//! After some failures in a row the database is asked whether it takes other work. A try that follows directly on a yes and
//! fails counts against the batch: for certain when the database takes other work directly afterwards too, or when it
//! happens twice. The latter finds what crashes the server, which takes no work until it is back. A database that cannot be
//! reached says nothing of the batch, neither for nor against it.

/// So often a try fails directly after other work was taken.
const CERTAIN: usize = 2;

/// What became of other work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OtherWork {
    Taken,
    Refused,
    Unreachable,
}

#[derive(Debug)]
pub(super) struct Blame {
    tries_before: usize,
    /// At the database, in a row.
    failures: usize,
    /// Other work was taken a moment ago.
    follows_others: bool,
    /// Failures that followed directly on other work.
    confirmed: usize,
}

impl Blame {
    pub(super) fn new(tries_before: usize) -> Self {
        Self { tries_before, failures: 0, follows_others: false, confirmed: 0 }
    }

    pub(super) fn asks_before_a_try(&self) -> bool {
        self.failures >= self.tries_before
    }

    pub(super) fn others_are_taken(&mut self) {
        self.follows_others = true;
    }

    /// A try was made; whether it followed directly on other work.
    pub(super) fn tried(&mut self) -> bool {
        std::mem::take(&mut self.follows_others)
    }

    /// It failed at the database. Whether that counts against the batch.
    pub(super) fn failed(&mut self, followed_others: bool) -> bool {
        self.failures += 1;
        self.confirmed += usize::from(followed_others);
        followed_others
    }

    pub(super) fn is_certain(&self) -> bool {
        self.confirmed >= CERTAIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_fails_after_other_work_counts() {
        let mut blame = Blame::new(3);
        for _ in 0..3 {
            assert!(!blame.asks_before_a_try());
            let followed = blame.tried();
            assert!(!blame.failed(followed));
        }
        // An outage: nothing is taken.
        for _ in 0..10 {
            assert!(blame.asks_before_a_try());
            let followed = blame.tried();
            assert!(!blame.failed(followed) && !blame.is_certain());
        }
        for certain in [false, true] {
            blame.others_are_taken();
            let followed = blame.tried();
            assert!(blame.failed(followed));
            assert_eq!(blame.is_certain(), certain);
        }
    }
}
