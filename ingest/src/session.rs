//! The state of a user session, and how two states of it become one.
//!
//! [`Session::merge`] is commutative, associative and idempotent: whatever the order, repetition and batching in which
//! events arrive, the same state comes out, and it is what the newest event says. The merge in SQL (`batch`) is the
//! same one. No I/O here.
//!
//! Each part of a session is a value that only grows: the newest (time, status, user) wins as a whole; a detail that
//! many events lack (name, region, address) is the newest one given; logins and logouts are the newest times.

mod batch;
mod broken;
mod decode;
mod fields;
mod probe;

pub use batch::Batch;
pub use decode::{Visitor, visit};

/// The states of a session. At one and the same time the later one in this order wins: a session that is both active
/// and gone is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    Active,
    Idle,
    Disconnected,
}

impl Status {
    pub const ALL: [Self; 3] = [Self::Active, Self::Idle, Self::Disconnected];

    /// As in messages and in the table.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Disconnected => "disconnected",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

/// What the newest event says. Ordered by time, then status, then user: a total order, so that ties are resolved the
/// same way always. Texts compare as bytes, as the columns do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Newest {
    /// Microseconds since 1970.
    pub at_us: i64,
    pub status: Status,
    pub user_id: Box<str>,
}

/// A detail and the time of the event that brought it. The newest wins, then the greater.
pub type Detail = Option<(i64, Box<str>)>;

/// Everything known of a session, apart from its id. Times in microseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    pub newest: Newest,
    pub username: Detail,
    pub region: Detail,
    pub ip_address: Detail,
    /// The newest login.
    pub login_us: Option<i64>,
    /// The newest logout.
    pub logout_us: Option<i64>,
}

impl Session {
    /// What is known after both.
    pub fn merge(&mut self, other: Self) {
        raise(&mut self.newest, other.newest);
        raise(&mut self.username, other.username);
        raise(&mut self.region, other.region);
        raise(&mut self.ip_address, other.ip_address);
        raise(&mut self.login_us, other.login_us);
        raise(&mut self.logout_us, other.logout_us);
    }

    /// The logout the table shows: a session that is in use has none.
    #[must_use]
    pub fn logout_time_us(&self) -> Option<i64> {
        self.logout_us.filter(|_| self.newest.status == Status::Disconnected)
    }
}

/// The greater of the two. `None` is less than anything.
fn raise<T: Ord>(value: &mut T, other: T) {
    if other > *value {
        *value = other;
    }
}

#[cfg(test)]
mod tests;
