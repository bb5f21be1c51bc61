//! What partitions there are, as the server's catalog says.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::{Span, Table};
use crate::failure::WriteError;

/// Written to a partition of ours as its comment before it is detached to be dropped. A table that somebody else has
/// detached carries no such mark and is never dropped.
pub(super) const EXPIRED: &str = "tier0: expired, about to be dropped";

/// An existing partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub schema: String,
    pub name: String,
    /// An open end is the least or greatest time there is.
    pub span: Span,
    /// Whether the per-device index is there and valid.
    pub indexed: bool,
    /// Whether it was about to be dropped.
    pub marked: bool,
}

/// The partitions of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Those with a span, oldest first.
    pub partitions: Vec<Partition>,
    /// The one that takes what the others do not, ready for SQL.
    pub default: Option<String>,
}

impl Partition {
    /// Ready for SQL.
    #[must_use]
    pub fn quoted(&self) -> String {
        self.quoted_beside(&self.name)
    }

    /// Another name in the partition's schema, ready for SQL.
    pub(super) fn quoted_beside(&self, name: &str) -> String {
        format!("{}.{}", quote(&self.schema), quote(name))
    }

    /// Of its per-device index. Postgres cuts names after 63 bytes: the end must stay.
    pub(super) fn index_name(&self) -> String {
        let start: String = self.name.chars().take(56).collect();
        format!("{start}_device")
    }
}

pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// All partitions of a table. One that is being detached is none any more.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn list(client: &Client, table: Table) -> Result<Listing, WriteError> {
    // Bounds as microseconds. What has no number (MINVALUE, infinity, the default partition) is null. OFFSET 0 keeps each bound
    // from being taken apart several times: the list is long and asked for every other second.
    const SQL: &str = "SELECT n.nspname::text, c.relname::text, bound = 'DEFAULT', \
          CASE WHEN isfinite(low) THEN (extract(epoch FROM low) * 1000000)::bigint END, \
          CASE WHEN isfinite(high) THEN (extract(epoch FROM high) * 1000000)::bigint END, \
          coalesce(high = '-infinity', false), coalesce(low = 'infinity', false), \
          EXISTS (SELECT FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid \
                  WHERE x.indrelid = c.oid AND x.indisvalid AND i.relname = left(c.relname, 56) || '_device'), \
          d.description IS NOT NULL \
        FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
        LEFT JOIN pg_description d ON d.objoid = c.oid AND d.classoid = 'pg_class'::regclass AND d.objsubid = 0 \
            AND d.description = $2, \
        LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS bound OFFSET 0) AS b, \
        LATERAL (SELECT substring(bound FROM $$FROM \\('([^']+)'\\)$$)::timestamptz AS low, \
                        substring(bound FROM $$TO \\('([^']+)'\\)$$)::timestamptz AS high OFFSET 0) AS t \
        WHERE h.inhparent = $1::text::regclass AND NOT h.inhdetachpending ORDER BY low NULLS FIRST";
    let rows = client.query(SQL, &[&table.qualified(), &EXPIRED]).await?;
    let mut listing = Listing { partitions: Vec::with_capacity(rows.len()), default: None };
    for row in rows {
        // Far enough for any time, and sums with it stay in range.
        const NEVER: i64 = i64::MAX / 4;
        let (low, high): (Option<i64>, Option<i64>) = (row.get(3), row.get(4));
        let (ends_before_all, begins_after_all): (bool, bool) = (row.get(5), row.get(6));
        let low = low.unwrap_or(if begins_after_all { NEVER } else { -NEVER });
        let high = high.unwrap_or(if ends_before_all { -NEVER } else { NEVER });
        let partition = Partition {
            schema: row.get(0),
            name: row.get(1),
            span: (low, high),
            indexed: row.get(7),
            marked: row.get(8),
        };
        if row.get(2) {
            listing.default = Some(partition.quoted());
        } else {
            listing.partitions.push(partition);
        }
    }
    Ok(listing)
}

/// Names beside the table that begin like those of its partitions.
///
/// # Errors
/// As classified by [`WriteError`].
pub async fn taken_names(client: &Client, table: Table) -> Result<BTreeSet<String>, WriteError> {
    const SQL: &str = "SELECT c.relname::text FROM pg_class c \
        WHERE c.relnamespace = 'public'::regnamespace AND starts_with(c.relname, $1::text || '_')";
    let rows = client.query(SQL, &[&table.name()]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
