//! Hostile values for a setting: those that differ most from what it is.

use tokio_postgres::Row;

/// A setting as the server describes it.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) name: String,
    kind: String,
    choices: Vec<String>,
    least: Option<String>,
    most: Option<String>,
    now: String,
}

impl Setting {
    pub(super) fn read(row: &Row) -> Self {
        Self {
            name: row.get(0),
            kind: row.get(1),
            choices: row.get::<_, Option<Vec<String>>>(2).unwrap_or_default(),
            least: row.get(3),
            most: row.get(4),
            now: row.get(5),
        }
    }

    pub(super) fn unlisted(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            kind: "string".into(),
            choices: Vec::new(),
            least: None,
            most: None,
            now: String::new(),
        }
    }
}

/// Settings of texts, each with values of its own.
const TEXTS: &[(&str, &[&str])] = &[
    ("DateStyle", &["German, DMY", "SQL, MDY", "Postgres, DMY"]),
    ("TimeZone", &["Asia/Kathmandu", "<+13>-13", "America/St_Johns"]),
    ("application_name", &["somebody else"]),
    ("backtrace_functions", &["errfinish"]),
    ("client_encoding", &["LATIN1", "SQL_ASCII", "SJIS"]),
    ("default_table_access_method", &["no_such_method"]),
    ("default_tablespace", &["no_such_tablespace"]),
    ("default_text_search_config", &["pg_catalog.german"]),
    ("dynamic_library_path", &["/nowhere"]),
    ("extension_destdir", &["/nowhere"]),
    ("lc_messages", &["POSIX"]),
    ("lc_monetary", &["POSIX"]),
    ("lc_numeric", &["POSIX"]),
    ("lc_time", &["POSIX"]),
    ("local_preload_libraries", &["no_such_library"]),
    ("log_parameter_max_length", &["0"]),
    ("restrict_nonsystem_relation_kind", &["view, foreign-table"]),
    ("role", &["other"]),
    ("search_path", &["decoy", "decoy, public", "", "pg_temp, decoy"]),
    ("session_authorization", &["other", "postgres"]),
    ("session_preload_libraries", &["no_such_library", "auto_explain"]),
    ("temp_tablespaces", &["no_such_tablespace"]),
    ("timezone_abbreviations", &["Australia", "India"]),
    ("wal_consistency_checking", &["all"]),
];

/// For what a later version of the server has brought: a minor version of Postgres 15 did.
const ANY_TEXTS: &[&str] = &["", "none", "0"];

/// The server takes none of the values for a role: they belong to the server's start, to a connection's or to a transaction's.
pub(super) const NEVER_TAKEN: &[&str] = &[
    "debug_discard_caches",
    "ignore_system_indexes",
    "jit_debugging_support",
    "jit_profiling_support",
    "log_connections",
    "log_disconnections",
    "post_auth_delay",
    "transaction_deferrable",
    "transaction_isolation",
];

pub(super) fn hostile(setting: &Setting) -> Vec<String> {
    let mut values: Vec<String> = match setting.kind.as_str() {
        "bool" => vec![if setting.now == "on" { "off" } else { "on" }.into()],
        "enum" => setting.choices.clone(),
        "integer" | "real" => {
            let mut ends: Vec<String> =
                [&setting.least, &setting.most].into_iter().flatten().cloned().collect();
            // 0 and -1 mostly say "not at all": the least that means something is hostile too.
            if setting.least.as_deref().is_some_and(|least| least.starts_with(['0', '-'])) {
                ends.push("1".into());
            }
            ends
        }
        _ => {
            let known = TEXTS.iter().find(|(name, _)| *name == setting.name);
            let values = known.map_or(ANY_TEXTS, |(_, values)| *values);
            values.iter().map(|value| (*value).to_owned()).collect()
        }
    };
    values.retain(|value| *value != setting.now);
    values
}

/// As it stands in `ALTER ROLE .. SET name = ..`. Lists are not quoted as a whole.
pub(super) fn quoted(name: &str, value: &str) -> String {
    let each: Vec<String> = match name {
        "search_path" | "DateStyle" | "restrict_nonsystem_relation_kind" => {
            value.split(", ").map(|part| format!("'{part}'")).collect()
        }
        _ => vec![format!("'{value}'")],
    };
    each.join(", ")
}
