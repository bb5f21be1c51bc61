//! Whether the tables keep what is committed, and once. Each of these can be changed while rows are written, without an error:
//! an unlogged table is empty after a crash, without its key a row that comes again is stored again, and with a collation for
//! which different texts are equal one device's reading passes for another's.

use anyhow::{Context, bail};
use tokio_postgres::Client;

/// A table must have a unique index of exactly these columns that is checked with each row. `None`: rows may be alike.
pub(super) type Key = Option<&'static [&'static str]>;

/// Partitions at any depth, and the tables themselves.
const UNLOGGED: &str = "SELECT c.oid::regclass::text FROM pg_catalog.pg_class c \
    WHERE c.relpersistence <> 'p' AND c.oid IN ( \
        SELECT pg_catalog.to_regclass(named) FROM pg_catalog.unnest($1::text[]) AS named UNION ALL \
        SELECT tree.relid FROM pg_catalog.unnest($1::text[]) AS named, \
            pg_catalog.pg_partition_tree(pg_catalog.to_regclass(named)) AS tree) \
    ORDER BY 1 LIMIT 1";

/// # Errors
/// The first table or partition that a crash empties, in one sentence; or the database cannot be asked.
pub(super) async fn survive_a_crash(client: &Client, names: &[String]) -> anyhow::Result<()> {
    let row = client.query_opt(UNLOGGED, &[&names]).await.context("ask which tables are logged")?;
    let Some(row) = row else { return Ok(()) };
    let name: &str = row.get(0);
    bail!(
        "{name} is unlogged: a crash empties it, and the standby has none of it: run ALTER TABLE {name} SET LOGGED"
    )
}

const HAS_KEY: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_index i \
    WHERE i.indrelid = pg_catalog.to_regclass($1) AND i.indisunique AND i.indimmediate AND i.indisvalid \
    AND i.indpred IS NULL AND i.indexprs IS NULL \
    AND NOT EXISTS (SELECT FROM pg_catalog.unnest(i.indcollation::oid[]) AS used JOIN pg_catalog.pg_collation p ON p.oid = used \
        WHERE NOT p.collisdeterministic) \
    AND (SELECT pg_catalog.array_agg(a.attname::text ORDER BY a.attname::text) \
        FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, place) \
        JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number \
        WHERE k.place <= i.indnkeyatts) \
      = (SELECT pg_catalog.array_agg(wanted ORDER BY wanted) FROM pg_catalog.unnest($2::text[]) AS wanted))";

/// # Errors
/// In one sentence when there is no such key; or the database cannot be asked.
pub(super) async fn has_key(client: &Client, name: &str, key: Key) -> anyhow::Result<()> {
    let Some(key) = key else { return Ok(()) };
    let row = client
        .query_one(HAS_KEY, &[&name, &key])
        .await
        .with_context(|| format!("ask for the key of {name}"))?;
    if row.get(0) {
        return Ok(());
    }
    let columns = key.join(", ");
    bail!(
        "table {name} has no unique key ({columns}) that is checked with each row, so a row that comes again would be stored \
         again: remove what is stored twice, then run ALTER TABLE {name} ADD PRIMARY KEY ({columns})"
    )
}
