//! What time it is, as far as a decision hangs on it.
//!
//! Three clocks are compared: this machine's, the primary's (asked every second), and what they said before, carried on
//! by the monotonic clock, which nobody can set. While they agree, the primary's is the one that counts, for all
//! consumers the same. While they do not, nobody knows which one is right, so nothing that one of them accepts is
//! refused, and nothing is dropped. docs/decisions/0017 has the rule and what was rejected.

mod beliefs;
mod watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use deadpool_postgres::ClientWrapper;
use tokio::time::Instant;

use crate::failure::WriteError;
use crate::partitions::{Span, micros};
use crate::settings::IngestSettings;
pub use beliefs::{Beliefs, Limits, State};
pub use watch::Watch;

/// One per process. Cheap to clone; all clones share what is known.
#[derive(Debug, Clone)]
pub struct Clock {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The monotonic clock counts from here.
    begun: Instant,
    beliefs: Mutex<Beliefs>,
    /// Whether readings are asked to confirm a time.
    in_doubt: AtomicBool,
}

/// The clocks at one moment, microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub own_us: i64,
    /// `None` before the primary has been asked.
    pub primary_us: Option<i64>,
    pub state: State,
}

impl Clock {
    #[must_use]
    pub fn new(settings: &IngestSettings) -> Self {
        let limits = Limits {
            retention_us: micros(settings.retention),
            tolerance_us: micros(settings.future_tolerance),
            max_offset_us: micros(settings.max_clock_offset),
        };
        Self {
            inner: Arc::new(Inner {
                begun: Instant::now(),
                beliefs: Mutex::new(Beliefs::new(limits)),
                in_doubt: AtomicBool::new(false),
            }),
        }
    }

    /// The time by the primary's clock; by this machine's until the primary has been asked.
    #[must_use]
    pub fn now_us(&self) -> i64 {
        let (own_us, at) = self.own();
        self.beliefs().now(own_us, at)
    }

    /// Oldest and newest time that is accepted now.
    #[must_use]
    pub fn window(&self) -> Span {
        let (own_us, at) = self.own();
        self.beliefs().window(own_us, at)
    }

    /// Every time that it may be now. Partitions are made for each of them.
    #[must_use]
    pub fn possible_us(&self) -> Vec<i64> {
        let (own_us, at) = self.own();
        self.beliefs().possible(own_us, at)
    }

    #[must_use]
    pub fn look(&self) -> Look {
        let (own_us, at) = self.own();
        let beliefs = self.beliefs();
        Look { own_us, primary_us: beliefs.primary(at), state: beliefs.state(own_us, at) }
    }

    /// Whether [`Clock::heard`] is of use now.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        self.inner.in_doubt.load(Ordering::Relaxed)
    }

    /// Readings of these times have been stored: what devices take the time to be.
    pub fn heard(&self, times_us: impl Iterator<Item = i64>) {
        let (own_us, at) = self.own();
        let mut beliefs = self.beliefs();
        times_us.for_each(|time| beliefs.heard(time, own_us, at));
        self.inner.in_doubt.store(beliefs.in_doubt(), Ordering::Relaxed);
    }

    /// Asks the primary for its time.
    ///
    /// # Errors
    /// As classified by [`WriteError`].
    pub async fn measure(&self, client: &ClientWrapper) -> Result<Look, WriteError> {
        const SQL: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";
        let statement = client.prepare_cached(SQL).await?;
        let sent = self.monotonic();
        let primary_us: i64 = client.query_one(&statement, &[]).await?.get(0);
        let (own_us, received) = self.own();
        {
            let mut beliefs = self.beliefs();
            beliefs.measured(primary_us, (sent, received), own_us);
            self.inner.in_doubt.store(beliefs.in_doubt(), Ordering::Relaxed);
        }
        Ok(self.look())
    }

    /// The newest reading that is stored, asked for before anything is judged: clocks that both went wrong while nobody
    /// looked are known by it.
    ///
    /// # Errors
    /// As classified by [`WriteError`].
    pub async fn remember_stored(&self, client: &ClientWrapper) -> Result<(), WriteError> {
        // The third newest device: a single one with a wrong clock says nothing about the time.
        const SQL: &str = "SELECT (extract(epoch FROM min(newest)) * 1000000)::bigint FROM ( \
                SELECT max(timestamp_utc) AS newest FROM ( \
                    SELECT device_id, timestamp_utc FROM public.device_telemetry ORDER BY timestamp_utc DESC LIMIT 10000 \
                ) AS readings GROUP BY device_id ORDER BY 1 DESC LIMIT 3 \
            ) AS devices";
        const THERE: &str = "SELECT to_regclass('public.device_telemetry') IS NOT NULL";
        if client.query_one(THERE, &[]).await?.get(0) {
            let stored_us: Option<i64> = client.query_one(SQL, &[]).await?.get(0);
            if let Some(stored_us) = stored_us {
                let (own_us, at) = self.own();
                let mut beliefs = self.beliefs();
                beliefs.remember_stored(stored_us, own_us, at);
                self.inner.in_doubt.store(beliefs.in_doubt(), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// This machine's clock, and the monotonic one at the same moment.
    fn own(&self) -> (i64, i64) {
        (jiff::Timestamp::now().as_microsecond(), self.monotonic())
    }

    fn monotonic(&self) -> i64 {
        i64::try_from(self.inner.begun.elapsed().as_micros()).unwrap_or(i64::MAX)
    }

    fn beliefs(&self) -> MutexGuard<'_, Beliefs> {
        self.inner.beliefs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
