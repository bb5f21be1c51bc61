//! Committing one batch: what each error is answered with.

use std::time::Duration;

use deadpool_postgres::Client;
use service::backoff::Backoff;
use tokio::time::{Instant, timeout};

use super::Writer;
use super::blame::{Blame, OtherWork};
use super::held::Held;
use crate::batch::committed::{Committed, in_time};
use crate::batch::{Batch, Path};
use crate::failure::WriteError;
use crate::partitions::{self, Layout};
use crate::trace::Tries;
use crate::transaction;

const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// The database fails on this batch again and again, and takes other work.
#[derive(Debug)]
pub(super) struct Poisoned {
    pub(super) error: String,
}

impl<B: Batch> Writer<B> {
    /// Commits a sealed batch, however long it takes. After `tries_before_blame` failures in a row the database is asked whether
    /// it takes anything else.
    ///
    /// # Errors
    /// When the database fails on this batch and on nothing else; what the batch holds is not stored then, or its outcome is unknown.
    pub(super) async fn commit(
        &self,
        batch: &mut B,
        tries: &mut Tries,
        tries_before_blame: usize,
    ) -> Result<Committed, Poisoned> {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut failing_since: Option<Instant> = None;
        let mut all_partitions_are_there = false;
        let mut blame = Blame::new(tries_before_blame);
        let mut held: Option<Held> = None;
        loop {
            if blame.asks_before_a_try() {
                match self.takes_other_work(batch).await {
                    OtherWork::Taken => blame.others_are_taken(),
                    OtherWork::Refused => {}
                    // Nothing to try it on.
                    OtherWork::Unreachable => {
                        self.pause(&mut backoff).await;
                        continue;
                    }
                }
            }
            if held.as_mut().is_some_and(Held::is_due) {
                tries.path = Path::Fast;
            }
            let started = Instant::now();
            tries.count += 1;
            let mut reached = false;
            let outcome = if held.as_ref().is_some_and(Held::is_refused) {
                self.probe(batch).await.map(|()| None)
            } else {
                self.attempt(batch, tries.path, &mut reached).await.map(Some)
            };
            let followed_others = blame.tried();
            let error = match outcome {
                Ok(Some(committed)) => {
                    drop(held);
                    // One that commits says nothing for another one that is held.
                    if self.metrics.held_by_schema.get() == 0 {
                        self.database.works();
                    }
                    if let Some(since) = failing_since {
                        tracing::info!(after = ?since.elapsed(), rows = batch.parts(), "batch committed at last");
                    }
                    return Ok(committed);
                }
                Ok(None) => {
                    // What was refused by the tables as they were is tried anew. Held until it is stored: what was offered
                    // to them is not what is in the batch.
                    held.iter_mut().for_each(Held::offer);
                    tries.path = Path::Fast;
                    continue;
                }
                Err(error) => error,
            };
            if self.tracer.is_on() {
                tries.note(started, || error.to_string());
            }
            match error {
                WriteError::Duplicate if !tries.path.merges() && tries.path != Path::IsolateUnplaced => {
                    self.metrics.merges.inc();
                    tries.path = Path::Merge;
                    continue;
                }
                WriteError::Swallowed { sent, kept } if !tries.path.merges() => {
                    tracing::error!(
                        sent,
                        kept,
                        "the table keeps fewer rows than it reports success for; finding them"
                    );
                    self.metrics.swallowed.inc();
                    tries.path = Path::Merge;
                    continue;
                }
                WriteError::Data { message, .. } if tries.path == Path::Fast => {
                    tracing::warn!(error = message, "the database refuses a row; isolating it");
                    self.metrics.isolations.inc();
                    tries.path = Path::Isolate;
                    continue;
                }
                WriteError::MissingPartition => match self.make_partitions(batch).await {
                    Ok(made) if made > 0 => continue,
                    // Another writer may have made it meanwhile.
                    Ok(_) if !std::mem::replace(&mut all_partitions_are_there, true) => continue,
                    Ok(_) => {
                        self.metrics.unknown_errors.inc();
                        tracing::error!("no partition takes a reading although all are there");
                        if self.isolates(Path::IsolateUnplaced, batch, tries, &mut held).await {
                            continue;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "cannot make a partition now"),
                },
                WriteError::Unknown(message) => {
                    self.metrics.unknown_errors.inc();
                    tracing::error!(error = message, rows = batch.parts(), "an error nobody has classified");
                    if self.isolates(Path::Isolate, batch, tries, &mut held).await {
                        continue;
                    }
                }
                WriteError::Schema(reason) => {
                    self.hold(&mut held, &reason, batch.parts());
                }
                // Somebody may hold a single row: a reading that is stored already needs no lock to be known as such.
                WriteError::Locked(_) if matches!(tries.path, Path::Fast | Path::Merge) => {
                    tries.path = Path::MergeByLook;
                    continue;
                }
                WriteError::Locked(reason) => {
                    if failing_since.is_none() {
                        tracing::warn!(
                            error = reason,
                            rows = batch.parts(),
                            "not committed; trying until the lock is given up"
                        );
                    }
                    self.database.refuses(&reason);
                }
                // A duplicate on the merge path is none of the readings: they are merged.
                WriteError::Data { .. } | WriteError::Duplicate | WriteError::Swallowed { .. } => {
                    self.metrics.unknown_errors.inc();
                    tracing::error!(%error, rows = batch.parts(), "an error nobody has classified; trying again");
                }
                WriteError::Retry(_) => {
                    if failing_since.is_none() {
                        tracing::warn!(%error, rows = batch.parts(), "not committed; trying until it is");
                    }
                    if reached && blame.failed(followed_others) {
                        let is_at_fault =
                            blame.is_certain() || self.takes_other_work(batch).await == OtherWork::Taken;
                        if is_at_fault {
                            return Err(Poisoned { error: error.to_string() });
                        }
                    }
                }
            }
            failing_since.get_or_insert_with(Instant::now);
            self.pause(&mut backoff).await;
        }
    }

    /// Asks whose fault an error is. The table's holds the batch; a row's is looked for on `path`, if that is new: then `true`.
    async fn isolates(&self, path: Path, batch: &B, tries: &mut Tries, held: &mut Option<Held>) -> bool {
        let is_new = match path {
            Path::IsolateUnplaced => tries.path != path,
            _ => tries.path == Path::Fast,
        };
        match self.probe(batch).await {
            Ok(()) if is_new => {
                self.metrics.isolations.inc();
                tries.path = path;
                return true;
            }
            Ok(()) => {}
            Err(WriteError::Schema(reason)) => self.hold(held, &reason, batch.parts()),
            Err(error) => tracing::warn!(%error, "whether the tables take other rows is not known"),
        }
        false
    }

    async fn pause(&self, backoff: &mut Backoff) {
        self.metrics.retries.inc();
        tokio::time::sleep(backoff.next(rand::random())).await;
    }

    fn hold(&self, held: &mut Option<Held>, reason: &str, rows: usize) {
        self.database.refuses(reason);
        match held {
            Some(held) => held.refuse(reason, rows),
            None => *held = Some(Held::new(&self.metrics.held_by_schema, reason, rows)),
        }
    }

    /// One try. `reached`: there was a database to try it on.
    async fn attempt(&self, batch: &mut B, path: Path, reached: &mut bool) -> Result<Committed, WriteError> {
        self.database.check_fault()?;
        let mut client = self.database.client().await?;
        *reached = true;
        let outcome = batch.commit(&mut client, path, self.database.commit_timeout()).await;
        self.give_back(client, &outcome);
        outcome
    }

    async fn probe(&self, batch: &B) -> Result<(), WriteError> {
        let client = self.database.client().await?;
        let outcome = batch.probe(&client, self.database.commit_timeout()).await;
        self.give_back(client, &outcome);
        outcome
    }

    /// Whether the database takes other work now: rows that these tables took before, also at the times of this batch, and a
    /// commit, on the standby too.
    async fn takes_other_work(&self, batch: &B) -> OtherWork {
        let Ok(client) = self.database.client().await else { return OtherWork::Unreachable };
        let patience = self.database.commit_timeout();
        let work = async {
            batch.probe(&client, patience).await?;
            in_time(patience, commit_a_message(&client)).await
        };
        let outcome = work.await;
        self.give_back(client, &outcome);
        if outcome.is_ok() { OtherWork::Taken } else { OtherWork::Refused }
    }

    /// A connection that is lost, or in an unknown state, is thrown away.
    fn give_back<T>(&self, client: Client, outcome: &Result<T, WriteError>) {
        if let Err(error) = outcome
            && !error.keeps_connection()
        {
            self.database.discard(client, &error.to_string());
        }
    }

    async fn make_partitions(&self, batch: &B) -> Result<usize, WriteError> {
        let layout = Layout::new(&self.settings);
        let needed = layout.cells(batch.timestamps());
        let mut client = self.database.client().await?;
        let making = partitions::ensure(&mut client, &layout, &needed);
        match timeout(self.database.commit_timeout(), making).await {
            Ok(Ok(made)) => Ok(made),
            Ok(Err(error)) => {
                self.database.discard(client, "partitions not made");
                Err(error)
            }
            Err(_) => {
                self.database.discard(client, "no answer while partitions were made");
                Err(WriteError::Retry("no answer while partitions were made".into()))
            }
        }
    }
}

async fn commit_a_message(client: &Client) -> Result<(), WriteError> {
    client.batch_execute(transaction::BEGIN).await?;
    client
        .batch_execute("SELECT pg_catalog.pg_logical_emit_message(true, 'tier0', 'takes commits?')")
        .await?;
    transaction::commit(client).await
}
