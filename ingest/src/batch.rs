//! What a writer needs of a batch, and what all batches have in common.
//!
//! A [`Batch`] is filled from messages, committed as a whole and settled. The writer, its retries, metrics and shutdown
//! are the same for every kind; what a message holds and which table it ends in is the kind's own business.

pub mod committed;

use std::future::Future;
use std::time::Duration;

use deadpool_postgres::Client;

use crate::audit::key::{Chosen, Key};
use crate::deliveries::Deliveries;
use crate::delivery::Delivery;
use crate::failure::WriteError;
use crate::reading::Rules;
use crate::settings::IngestSettings;
use crate::tolerated::Tally;
use committed::Committed;

/// Which way a batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// What a good batch takes.
    Fast,
    /// Some row is refused: find it, store the rest.
    Isolate,
    /// As `Isolate`, and a row that no partition takes is refused too: those for the batch's times are all there.
    IsolateUnplaced,
    /// Some row is stored already: everything through a temporary table, duplicates left out.
    Merge,
    /// As `Merge`, and what is stored is found by a look at it: somebody holds a row, or a table.
    MergeByLook,
}

impl Path {
    /// Whether rows are refused one by one.
    #[must_use]
    pub fn isolates(self) -> bool {
        matches!(self, Self::Isolate | Self::IsolateUnplaced)
    }

    /// Whether everything goes through a temporary table.
    #[must_use]
    pub fn merges(self) -> bool {
        matches!(self, Self::Merge | Self::MergeByLook)
    }

    /// As traces name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Isolate | Self::IsolateUnplaced => "isolate",
            Self::Merge | Self::MergeByLook => "merge",
        }
    }
}

/// Rows and refused messages that are committed together.
pub trait Batch: Send + Sync + 'static {
    /// What the decoder remembers from batch to batch; one for all writers of a queue.
    type Memory: Send;

    /// Nothing remembered yet.
    fn memory(settings: &IngestSettings) -> Self::Memory;

    /// An empty batch. `source` goes into dead letters.
    fn new(source: &'static str, rules: Rules) -> Self;

    /// The window of accepted times moves with the clock.
    fn set_rules(&mut self, rules: Rules);

    /// Decodes one message.
    fn push(&mut self, delivery: Delivery, now_us: i64, memory: &mut Self::Memory);

    fn deliveries(&self) -> &Deliveries;

    fn deliveries_mut(&mut self) -> &mut Deliveries;

    /// Readings found in its messages, refused ones included, whatever becomes of them.
    fn parts(&self) -> usize;

    /// Bytes to send so far.
    fn bytes(&self) -> usize;

    /// Times of what is in the batch, microseconds since 1970: for the end-to-end latency.
    fn timestamps(&self) -> impl Iterator<Item = i64> + '_;

    /// Readings by site and device type, for kinds that have such.
    fn site_counts(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        std::iter::empty()
    }

    /// Refuses the message with this number as a whole: what it holds becomes one dead letter. For a batch of this message
    /// alone, when the database cannot store it.
    fn refuse_whole(&mut self, error: String);
    /// How many readings were taken although they are not as the contract asks, by what was tolerated.
    fn tolerated(&self) -> Tally {
        Tally::default()
    }

    /// Closes the batch: nothing may be pushed after this until it is cleared.
    fn seal(&mut self);

    /// Commits everything in one transaction; no step may take longer than `patience`. On an error nothing is stored, or, if the connection was lost, the
    /// outcome is unknown; trying again is harmless in both cases.
    ///
    /// # Errors
    /// [`WriteError`] says what to do next. The connection must be thrown away after `Retry` and `Unknown`.
    fn commit(
        &mut self,
        client: &mut Client,
        path: Path,
        patience: Duration,
    ) -> impl Future<Output = Result<Committed, WriteError>> + Send;

    /// Asks whether the tables still take what they took before, also at the times of what is in the batch, in a transaction that
    /// is rolled back.
    ///
    /// # Errors
    /// [`WriteError::Schema`] when they do not; otherwise errors of the server or network.
    fn probe(
        &self,
        client: &Client,
        patience: Duration,
    ) -> impl Future<Output = Result<(), WriteError>> + Send;

    /// Keys of what is committed, a few chosen by `random`, to be read again later.
    fn sample(&self, random: u64) -> Chosen;

    /// Which of these keys, by their number, the tables do not have.
    ///
    /// # Errors
    /// As classified by [`WriteError`].
    fn missing(
        client: &tokio_postgres::Client,
        keys: &[Key],
    ) -> impl Future<Output = Result<Vec<usize>, WriteError>> + Send;

    /// Empties the batch; its memory is kept for the next one.
    fn clear(&mut self);
}
