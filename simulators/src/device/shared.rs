//! What the connections of a run share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;
use super::publisher::{Now, Publisher};
use super::settings::DeviceSimulatorSettings;
use crate::seeds::{join, mix};

/// Handshakes at a time. A broker's listen queue is often 100.
const HANDSHAKES: usize = 64;

/// What the connections of a run share.
#[derive(Debug)]
pub struct Shared {
    pub settings: DeviceSimulatorSettings,
    pub metrics: Metrics,
    /// New in each run: keeps client ids and jitter of two simulators apart.
    pub run: u64,
    pub gate: Semaphore,
    pub(super) started: Instant,
    pub(super) started_us: i64,
    /// Cancelled when the first connection is up.
    pub(super) begun: CancellationToken,
    /// Cancelled when every connection has made and settled its part of `count`.
    pub(super) finished: CancellationToken,
    up: AtomicU32,
    unfinished: AtomicU32,
    problem: Mutex<Option<String>>,
}

impl Shared {
    pub(super) fn new(settings: DeviceSimulatorSettings, metrics: Metrics) -> Self {
        let started_us = Timestamp::now().as_microsecond();
        let run = join(mix(std::process::id().into()), started_us.unsigned_abs());
        let unfinished = AtomicU32::new(settings.device_simulator.connections);
        Self {
            settings,
            metrics,
            run,
            gate: Semaphore::new(HANDSHAKES),
            started: Instant::now(),
            started_us,
            begun: CancellationToken::new(),
            finished: CancellationToken::new(),
            up: AtomicU32::new(0),
            unfinished,
            problem: Mutex::new(None),
        }
    }

    /// Both clocks.
    #[must_use]
    pub fn now(&self) -> Now {
        Now { since: self.started.elapsed(), wall_us: Timestamp::now().as_microsecond() }
    }

    pub fn connection_up(&self) {
        self.up.fetch_add(1, Ordering::Relaxed);
        self.metrics.connections.inc();
        self.begun.cancel();
    }

    pub fn connection_down(&self) {
        self.up.fetch_sub(1, Ordering::Relaxed);
        self.metrics.connections.dec();
    }

    pub fn connection_finished(&self) {
        if self.unfinished.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.finished.cancel();
        }
    }

    /// Keeps the newest problem for the watch, which logs for all connections together.
    pub fn report(&self, problem: &anyhow::Error) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{problem:#}"));
    }

    /// Connections that are up.
    #[must_use]
    pub fn up(&self) -> u32 {
        self.up.load(Ordering::Relaxed)
    }

    /// The newest problem of any connection, once.
    #[must_use]
    pub fn take_problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// All publishers of the run, by connection number.
pub type Publishers = Arc<Vec<Arc<Mutex<Publisher>>>>;
