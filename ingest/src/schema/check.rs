//! What must hold before a process takes messages: the tables are there and as this program knows them, and its role may do
//! what it will have to do. Each fault is one sentence that names role, right and object, and the statement that mends it.

use std::fmt::Write as _;

use anyhow::{Context, bail, ensure};
use tokio_postgres::Client;

use super::confirm;
use super::keeping::{self, Key};
use crate::failure::WriteError;

/// What a process writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Readings. It keeps the partitions too, so it must own the tables.
    Telemetry,
    /// User sessions and site reports.
    Sessions,
}

/// A table as this program uses it.
struct Table {
    name: &'static str,
    rights: &'static [&'static str],
    /// Columns that are written, and their types. A binary COPY does not convert: `metrics` as text would keep a stray byte.
    columns: &'static [(&'static str, &'static str)],
    /// Whether `columns` are all that an insert fills.
    complete: bool,
    key: Key,
}

const TELEMETRY: &[Table] = &[
    Table {
        name: "device_telemetry",
        rights: &["SELECT", "INSERT", "UPDATE"],
        columns: &[
            ("device_id", "text"),
            ("device_type", "text"),
            ("site_id", "text"),
            ("timestamp_utc", "timestamp with time zone"),
            ("firmware", "text"),
            ("metrics", "jsonb"),
            ("status", "jsonb"),
            ("location", "jsonb"),
            ("tags", "jsonb"),
        ],
        complete: true,
        key: Some(&["device_id", "timestamp_utc"]),
    },
    DEAD_LETTERS,
    DEAD_LETTER_STORAGE,
    Table {
        name: "mqtt_sessions",
        rights: &["SELECT", "INSERT", "UPDATE"],
        columns: &[("client_id", "text"), ("broker", "text"), ("filter", "text")],
        complete: false,
        key: Some(&["client_id", "broker"]),
    },
];

const SESSIONS: &[Table] = &[
    Table {
        name: "user_sessions",
        rights: &["SELECT", "INSERT", "UPDATE"],
        columns: &[
            ("session_id", "text"),
            ("user_id", "text"),
            ("username", "text"),
            ("connection_status", "text"),
            ("region", "text"),
            ("ip_address", "text"),
            ("login_time", "timestamp with time zone"),
            ("logout_time", "timestamp with time zone"),
            ("last_activity", "timestamp with time zone"),
            ("username_at", "timestamp with time zone"),
            ("region_at", "timestamp with time zone"),
            ("ip_address_at", "timestamp with time zone"),
            ("logout_at", "timestamp with time zone"),
        ],
        complete: true,
        key: Some(&["session_id"]),
    },
    Table {
        name: "site_activity",
        rights: &["SELECT", "INSERT", "UPDATE"],
        columns: &[("site_id", "text"), ("timestamp_utc", "timestamp with time zone"), ("metrics", "jsonb")],
        complete: true,
        key: Some(&["site_id", "timestamp_utc"]),
    },
    DEAD_LETTERS,
    DEAD_LETTER_STORAGE,
];

/// Read with every letter.
const DEAD_LETTER_STORAGE: Table = Table {
    name: "dead_letter_storage",
    rights: &["SELECT"],
    columns: &[("letters", "boolean"), ("payloads", "boolean")],
    complete: false,
    key: None,
};

const DEAD_LETTERS: Table = Table {
    name: "dead_letters",
    rights: &["INSERT"],
    columns: &[
        ("received_at", "timestamp with time zone"),
        ("source", "text"),
        ("topic", "text"),
        ("reason", "text"),
        ("error", "text"),
        ("payload", "bytea"),
        ("payload_bytes", "bigint"),
        ("payload_sha256", "bytea"),
    ],
    complete: true,
    key: None,
};

/// Whether the tables still are what rows are encoded for, and keep them. Rows that are offered through parameters do not show
/// it: the server converts those.
///
/// # Errors
/// [`WriteError::Schema`] with the first fault, in one sentence; otherwise errors of the server or network.
pub(crate) async fn are_ours(client: &Client, purpose: Purpose) -> Result<(), WriteError> {
    check_shape(client, purpose).await.map_err(|error| match error.downcast_ref::<tokio_postgres::Error>() {
        Some(_) => WriteError::Retry(format!("{error:#}")),
        None => WriteError::Schema(error.to_string()),
    })
}

async fn check_shape(client: &Client, purpose: Purpose) -> anyhow::Result<()> {
    let mut names = Vec::new();
    for table in tables(purpose) {
        let name = format!("public.{}", table.name);
        check_columns(client, table, &name).await?;
        keeping::has_key(client, &name, table.key).await?;
        names.push(name);
    }
    keeping::survive_a_crash(client, &names).await
}

fn tables(purpose: Purpose) -> &'static [Table] {
    match purpose {
        Purpose::Telemetry => TELEMETRY,
        Purpose::Sessions => SESSIONS,
    }
}

/// Whether everything is there that `purpose` needs.
///
/// # Errors
/// The first fault, in one sentence; or the database cannot be reached.
pub async fn check(client: &Client, purpose: Purpose) -> anyhow::Result<()> {
    may_use_schema(client).await?;
    confirm(client).await?;
    for table in tables(purpose) {
        check_table(client, table, purpose == Purpose::Telemetry).await?;
    }
    check_shape(client, purpose).await?;
    may_make_temporary_tables(client).await?;
    if purpose == Purpose::Telemetry { may_make_tables(client).await } else { Ok(()) }
}

async fn may_use_schema(client: &Client) -> anyhow::Result<()> {
    const SQL: &str = "SELECT current_user::text, pg_catalog.has_schema_privilege('public', 'USAGE')";
    let row = client.query_one(SQL, &[]).await.context("ask for rights on schema public")?;
    let role: &str = row.get(0);
    ensure!(
        row.get::<_, bool>(1),
        "role {role} may not use schema public: run GRANT USAGE ON SCHEMA public TO {role}"
    );
    Ok(())
}

async fn may_make_temporary_tables(client: &Client) -> anyhow::Result<()> {
    const SQL: &str = "SELECT current_user::text, pg_catalog.current_database()::text, \
        pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY')";
    let row = client.query_one(SQL, &[]).await.context("ask for rights on the database")?;
    let (role, database): (&str, &str) = (row.get(0), row.get(1));
    ensure!(
        row.get::<_, bool>(2),
        "role {role} may not make temporary tables: run GRANT TEMPORARY ON DATABASE {database} TO {role}"
    );
    Ok(())
}

/// Partitions, or what a migration brings.
pub(super) async fn may_make_tables(client: &Client) -> anyhow::Result<()> {
    const SQL: &str = "SELECT current_user::text, pg_catalog.has_schema_privilege('public', 'CREATE') \
        AND pg_catalog.has_schema_privilege('public', 'USAGE')";
    let row = client.query_one(SQL, &[]).await.context("ask for rights on schema public")?;
    let role: &str = row.get(0);
    ensure!(
        row.get::<_, bool>(1),
        "role {role} may not make tables: run GRANT USAGE, CREATE ON SCHEMA public TO {role}"
    );
    Ok(())
}

async fn check_table(client: &Client, table: &Table, owned: bool) -> anyhow::Result<()> {
    const SQL: &str = "SELECT current_user::text, c.relkind::text, pg_catalog.pg_has_role(c.relowner, 'USAGE'), \
        pg_catalog.row_security_active(c.oid), \
        ARRAY(SELECT needed FROM pg_catalog.unnest($2::text[]) AS needed \
              WHERE NOT pg_catalog.has_table_privilege(c.oid, needed)) \
        FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass($1)";
    let name = format!("public.{}", table.name);
    let row = client
        .query_opt(SQL, &[&name, &table.rights])
        .await
        .with_context(|| format!("ask for rights on {name}"))?
        .with_context(|| {
            format!(
                "table {name} is missing although the migrations are recorded: was it renamed or dropped?"
            )
        })?;
    let (role, kind): (&str, &str) = (row.get(0), row.get(1));
    ensure!(matches!(kind, "r" | "p"), "{name} is no table: it was replaced by a view or a foreign table");
    let missing: Vec<String> = row.get(4);
    if !missing.is_empty() {
        let rights = missing.join(", ");
        bail!("role {role} lacks {rights} on {name}: run GRANT {rights} ON {name} TO {role}");
    }
    ensure!(
        !row.get::<_, bool>(3),
        "row-level security hides rows of {name} from role {role}: run ALTER TABLE {name} DISABLE ROW LEVEL SECURITY"
    );
    ensure!(
        !owned || row.get::<_, bool>(2),
        "role {role} does not own {name}, so it cannot keep its partitions: run ALTER TABLE {name} OWNER TO {role}"
    );
    Ok(())
}

async fn check_columns(client: &Client, table: &Table, name: &str) -> anyhow::Result<()> {
    const SQL: &str = "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), \
        a.attnotnull AND NOT a.atthasdef AND a.attidentity = '', coalesce(NOT p.collisdeterministic, false) \
        FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_collation p ON p.oid = a.attcollation \
        WHERE a.attrelid = pg_catalog.to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";
    let found = client.query(SQL, &[&name]).await.with_context(|| format!("read the columns of {name}"))?;
    let mut faults = String::new();
    for (column, wanted) in table.columns {
        let found = found.iter().find(|row| row.get::<_, &str>(0) == *column);
        match found.map(|row| (row.get::<_, &str>(1), row.get(3))) {
            Some((is, false)) if is == *wanted => {}
            Some((is, true)) if is == *wanted => {
                write!(faults, "; column {column} has a collation for which different texts are equal")?;
            }
            Some((is, _)) => write!(faults, "; column {column} is {is}, not {wanted}")?,
            None => write!(faults, "; column {column} is missing")?,
        }
    }
    for row in found.iter().filter(|row| table.complete && row.get::<_, bool>(2)) {
        let column: &str = row.get(0);
        if !table.columns.iter().any(|(known, _)| *known == column) {
            write!(faults, "; column {column} is NOT NULL without a default, and no row of ours fills it")?;
        }
    }
    let faults = faults.trim_start_matches("; ");
    ensure!(faults.is_empty(), "table {name} was changed: {faults}");
    Ok(())
}
