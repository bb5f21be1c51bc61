//! Dropping partitions, and finishing what a process that died meanwhile has left.
//!
//! Only what this program has marked as expired is ever dropped. A partition that somebody else detaches, to archive it
//! for instance, stays.

use tokio_postgres::Client;

use super::catalog::{EXPIRED, quote};
use super::{Partition, Table};
use crate::failure::WriteError;
use crate::transaction::{self, BEGIN};

/// Longest wait for a lock on a table with a default partition: such a partition cannot be detached concurrently, and
/// whoever writes to the table waits as long as we do.
const SHORT_LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '200ms'";

/// What was finished.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// Tables that were detached and marked, and are dropped now.
    pub dropped: Vec<String>,
    /// Detached by somebody else and left half done: detached now, and kept.
    pub kept: Vec<String>,
}

/// Finishes what was begun: a detach that is pending (which would make every later one fail), a table of ours that is
/// detached and not dropped.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn finish_drops(client: &Client, table: Table) -> Result<Drops, WriteError> {
    const PENDING: &str = "SELECT n.nspname::text, c.relname::text, \
            coalesce(obj_description(c.oid, 'pg_class') = $2, false) \
        FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE h.inhparent = $1::text::regclass AND h.inhdetachpending";
    const ORPHANS: &str = "SELECT n.nspname::text, c.relname::text \
        FROM pg_description d JOIN pg_class c ON c.oid = d.objoid JOIN pg_namespace n ON n.oid = c.relnamespace \
        WHERE d.classoid = 'pg_class'::regclass AND d.objsubid = 0 AND d.description = $2 AND c.relkind = 'r' \
          AND NOT c.relispartition AND starts_with(c.relname, $1::text || '_') \
          AND c.relnamespace = 'public'::regnamespace";
    let mut drops = Drops::default();
    for row in client.query(PENDING, &[&table.qualified(), &EXPIRED]).await? {
        let name = format!("{}.{}", quote(row.get(0)), quote(row.get(1)));
        client
            .batch_execute(&format!("ALTER TABLE {} DETACH PARTITION {name} FINALIZE", table.qualified()))
            .await?;
        if !row.get::<_, bool>(2) {
            drops.kept.push(row.get(1));
        }
    }
    for row in client.query(ORPHANS, &[&table.name(), &EXPIRED]).await? {
        let name = format!("{}.{}", quote(row.get(0)), quote(row.get(1)));
        client.batch_execute(&format!("DROP TABLE {name}")).await?;
        drops.dropped.push(row.get(1));
    }
    Ok(drops)
}

/// Drops a partition. `default` is the table's default partition; without one writers of the other partitions are not
/// kept waiting, with one they are for at most 200 ms.
///
/// # Errors
/// As classified by [`WriteError`]; a lock that is not got in time is [`WriteError::Locked`]. The partition is there or
/// gone, or [`finish_drops`] ends what was begun.
pub async fn drop_expired(
    client: &Client,
    table: Table,
    partition: &Partition,
    default: Option<&str>,
) -> Result<(), WriteError> {
    let (parent, name) = (table.qualified(), partition.quoted());
    if default.is_some() {
        client.batch_execute(BEGIN).await?;
        let sql =
            format!("{SHORT_LOCK_TIMEOUT}; ALTER TABLE {parent} DETACH PARTITION {name}; DROP TABLE {name}");
        if let Err(error) = client.batch_execute(&sql).await {
            transaction::roll_back(client).await?;
            return Err(error.into());
        }
        return transaction::commit(client).await;
    }
    client.batch_execute(&format!("COMMENT ON TABLE {name} IS '{EXPIRED}'")).await?;
    client.batch_execute(&format!("ALTER TABLE {parent} DETACH PARTITION {name} CONCURRENTLY")).await?;
    Ok(client.batch_execute(&format!("DROP TABLE {name}")).await?)
}

/// Takes the mark off a partition that is not dropped after all: whoever detaches it now keeps it.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn clear_marks<'p>(
    client: &Client,
    partitions: impl Iterator<Item = &'p Partition>,
) -> Result<(), WriteError> {
    for partition in partitions.filter(|partition| partition.marked) {
        client.batch_execute(&format!("COMMENT ON TABLE {} IS NULL", partition.quoted())).await?;
    }
    Ok(())
}
