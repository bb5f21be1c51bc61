//! Clients that do not care who is primary: one per node, it commits wherever the node lets it. A commit that a node
//! acknowledged and the primary does not have afterwards proves that two nodes could acknowledge.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::Config;

use playground::cluster::Cluster;
use playground::postgres::{Role, connect};

pub(super) const TABLE: &str = "CREATE TABLE drill_probe (id bigint PRIMARY KEY, node text NOT NULL, at timestamptz DEFAULT clock_timestamp())";
const LIMIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);
const REOPEN: Duration = Duration::from_millis(50);
/// Ids of different nodes never meet.
const SPAN: i64 = 1_000_000_000;

/// Commits until dropped.
#[derive(Debug)]
pub(super) struct Probes {
    acknowledged: Arc<Mutex<BTreeSet<i64>>>,
    _clients: JoinSet<()>,
}

impl Probes {
    pub(super) fn start(cluster: &Cluster) -> Self {
        let acknowledged = Arc::new(Mutex::new(BTreeSet::new()));
        let mut clients = JoinSet::new();
        for (node, first) in cluster.nodes.iter().zip(0_i64..) {
            let (name, config) = (node.name().to_owned(), node.config(Role::Owner));
            clients.spawn(commit(name, config, first * SPAN, acknowledged.clone()));
        }
        Self { acknowledged, _clients: clients }
    }

    /// Everything acknowledged up to now is on every node; how much that is.
    ///
    /// # Errors
    /// When it is not, or a node does not answer.
    pub(super) async fn check(&self, cluster: &Cluster) -> anyhow::Result<usize> {
        // Taken first: what is acknowledged meanwhile may be missing in what is read.
        let acknowledged = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).clone();
        cluster.wait_replayed(Duration::from_secs(60)).await?;
        for node in &cluster.nodes {
            let db = node.connect(Role::Owner).await?;
            let rows = db.query("SELECT id FROM drill_probe", &[]).await.context("read the probes")?;
            let stored: BTreeSet<i64> = rows.iter().map(|row| row.get(0)).collect();
            let lost: Vec<_> = acknowledged.difference(&stored).collect();
            if let (Some(first), Some(last)) = (lost.first(), lost.last()) {
                bail!(
                    "{} commits that region{} acknowledged are not on {}: ids {first} to {last}",
                    lost.len(),
                    *first / SPAN + 1,
                    node.name()
                );
            }
        }
        Ok(acknowledged.len())
    }
}

async fn commit(node: String, config: Config, first: i64, acknowledged: Arc<Mutex<BTreeSet<i64>>>) {
    let mut id = first;
    loop {
        if let Ok(Ok(db)) = timeout(LIMIT, connect(&config)).await {
            loop {
                id += 1;
                let sql = "INSERT INTO drill_probe (id, node) VALUES ($1, $2)";
                // No answer, or an error (a standby refuses): nothing was promised, and the session is dropped.
                match timeout(LIMIT, db.execute(sql, &[&id, &node])).await {
                    Ok(Ok(_)) => {
                        acknowledged.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
                    }
                    _ => break,
                }
                sleep(PAUSE).await;
            }
        }
        sleep(REOPEN).await;
    }
}
