//! The standbys' part of the audit: each is asked for keys when it has replayed their commit.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::{Instant, timeout};
use tokio_postgres::Client;

use super::{Key, STANDBY_PATIENCE};
use crate::batch::Batch;
use crate::database::Database;
use crate::failure::WriteError;
use crate::metrics::AuditMetrics;

/// Longest wait for one answer of a standby.
const PATIENCE: Duration = Duration::from_secs(5);
/// Looks that wait for one standby; each is at most [`super::KEYS_AT_ONCE`] keys.
const MAX_LOOKS: usize = 30;

/// Keys that the primary has, and where its log was then.
#[derive(Debug)]
struct Look {
    keys: Vec<Key>,
    lsn: String,
    since: Instant,
}

/// One node, asked while it is in recovery.
#[derive(Debug)]
struct Standby {
    number: usize,
    looks: VecDeque<Look>,
    session: Option<Client>,
}

#[derive(Debug)]
pub(super) struct Standbys {
    database: Database,
    nodes: Vec<Standby>,
}

impl Standbys {
    pub(super) fn new(database: &Database) -> Self {
        let standby = |number| Standby { number, looks: VecDeque::new(), session: None };
        Self { nodes: (0..database.nodes()).map(standby).collect(), database: database.clone() }
    }

    /// Nothing waits for a standby.
    pub(super) fn is_idle(&self) -> bool {
        self.nodes.iter().all(|node| node.looks.is_empty())
    }

    /// These keys are on the primary, whose log was at `lsn` afterwards.
    pub(super) fn expect(&mut self, keys: Vec<Key>, lsn: String) {
        for node in &mut self.nodes {
            if node.looks.len() < MAX_LOOKS {
                let look = Look { keys: keys.clone(), lsn: lsn.clone(), since: Instant::now() };
                node.looks.push_back(look);
            }
        }
    }

    /// Asks every standby for what it must have by now.
    pub(super) async fn ask<B: Batch>(&mut self, metrics: &AuditMetrics) {
        for node in &mut self.nodes {
            if let Err(error) = node.ask::<B>(&self.database, metrics).await {
                tracing::debug!(node = node.number, %error, "a standby was not asked for committed keys");
                node.session = None;
            }
            // Away, lagging, or not a standby: what it cannot be asked is forgotten.
            node.looks.retain(|look| {
                let waits = look.since.elapsed() < STANDBY_PATIENCE;
                if !waits {
                    metrics.unverified.inc_by(look.keys.len() as u64);
                }
                waits
            });
        }
    }
}

impl Standby {
    async fn ask<B: Batch>(&mut self, database: &Database, metrics: &AuditMetrics) -> Result<(), WriteError> {
        let Some(newest) = self.looks.back() else { return Ok(()) };
        let session = match self.session.take().filter(|session| !session.is_closed()) {
            Some(session) => session,
            None => database.open(self.number).await?,
        };
        let look = async {
            // The newest that is replayed covers those before it.
            const REPLAYED: &str = "SELECT pg_catalog.pg_is_in_recovery(), \
                coalesce(pg_catalog.pg_last_wal_replay_lsn() >= $1::text::pg_lsn, false)";
            let mut asked = 0;
            let mut missing = Vec::new();
            let row = session.query_one(REPLAYED, &[&newest.lsn]).await?;
            let (is_standby, has_all): (bool, bool) = (row.get(0), row.get(1));
            if !is_standby {
                return Ok((None, missing));
            }
            for look in &self.looks {
                if !has_all && !session.query_one(REPLAYED, &[&look.lsn]).await?.get::<_, bool>(1) {
                    break;
                }
                missing.push(B::missing(&session, &look.keys).await?);
                asked += 1;
            }
            Ok::<_, WriteError>((Some(asked), missing))
        };
        let (asked, missing) = match timeout(PATIENCE, look).await {
            Ok(looked) => looked?,
            Err(_) => return Err(WriteError::Retry(format!("no answer within {PATIENCE:?}"))),
        };
        self.session = Some(session);
        let Some(asked) = asked else {
            // It is the primary, which was asked.
            self.looks.clear();
            return Ok(());
        };
        for (look, missing) in self.looks.drain(..asked).zip(missing) {
            metrics.found("standby", look.keys.len(), &missing, &look.keys);
        }
        Ok(())
    }
}
