//! The settings of every Postgres session of ours, whatever a DBA has set for the role or the database.
//!
//! `ALTER ROLE .. SET` and `ALTER DATABASE .. SET` change what a new session starts with. Our statements must mean the same
//! everywhere, so each session brings its own values. As start-up `options` they take precedence over those of role and
//! database, and hold before the first statement. A pooler may refuse `options`; [`set_all`] sets the same values afterwards.

/// One setting and the value it has in our sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    pub name: &'static str,
    /// As `current_setting` shows it.
    pub value: &'static str,
    pub scope: Scope,
}

/// When a setting can be given, and whether it can be read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// At the start or later; what the session says of it must be `value`.
    Session,
    /// As `Session`, but the operating system may round it or not have it: it is not compared.
    Unchecked,
    /// At the start only. It has no effect later.
    Start,
    /// Only newer servers have it, and older ones refuse a start with it: set later when it differs.
    Later,
}

const fn session(name: &'static str, value: &'static str) -> Setting {
    Setting { name, value, scope: Scope::Session }
}

/// What a commit promises: flushed here and on the synchronous standby. `local` and `off` would acknowledge without it.
pub const SYNCHRONOUS_COMMIT: Setting = session("synchronous_commit", "on");

/// A commit that gave up waiting for the standby reports success and a WARNING. Without the WARNING it looks replicated.
pub const CLIENT_MIN_MESSAGES: Setting = session("client_min_messages", "warning");

/// `"$user"`, in front by default, would lead to a second, empty set of tables in a schema named as the role. The temporary
/// schema comes last, so that a temporary table hides none of ours.
pub const SEARCH_PATH: Setting = session("search_path", "public, pg_temp");

/// What our bytes are taken for. With another one the server converts what we send, without an error.
pub const CLIENT_ENCODING: Setting = session("client_encoding", "UTF8");

/// All of them. A server must be Postgres 14 or newer to know those of `Session` and `Start`.
pub const SETTINGS: &[Setting] = &[
    // First: the statements that set the others must not run into it.
    session("statement_timeout", "0"),
    SYNCHRONOUS_COMMIT,
    CLIENT_MIN_MESSAGES,
    // A statement that needs a limit sets its own. The client drops a connection that does not answer; it never lets the
    // server cancel a commit.
    session("lock_timeout", "0"),
    session("idle_session_timeout", "0"),
    // As in config/postgres/postgresql.conf: a client that froze in a transaction must not hold its locks for ever.
    session("idle_in_transaction_session_timeout", "1min"),
    Setting { name: "transaction_timeout", value: "0", scope: Scope::Later },
    // An error in a transaction is answered by ROLLBACK, not by the end of the session.
    session("exit_on_error", "off"),
    SEARCH_PATH,
    session("role", "none"),
    // A policy that hides rows or refuses some is an error, not a smaller result.
    session("row_security", "off"),
    session("default_transaction_read_only", "off"),
    session("default_transaction_isolation", "read committed"),
    session("default_transaction_deferrable", "off"),
    CLIENT_ENCODING,
    // How values are written as text and read from it.
    session("DateStyle", "ISO, YMD"),
    session("IntervalStyle", "postgres"),
    session("TimeZone", "UTC"),
    session("extra_float_digits", "1"),
    session("bytea_output", "hex"),
    session("standard_conforming_strings", "on"),
    session("backslash_quote", "safe_encoding"),
    session("quote_all_identifiers", "off"),
    session("array_nulls", "on"),
    session("transform_null_equals", "off"),
    // Where new partitions and temporary tables go.
    session("default_table_access_method", "heap"),
    session("default_tablespace", ""),
    session("temp_tablespaces", ""),
    // Reserved as a whole by the first temporary table of a session: the largest value takes the server's memory.
    session("temp_buffers", "8MB"),
    // Not about being exact: our statements are short, and either setting can make each of them a hundred times slower.
    session("jit", "off"),
    session("plan_cache_mode", "auto"),
    // As in config/postgres/postgresql.conf. A value of milliseconds ends every session.
    Setting { name: "tcp_user_timeout", value: "10s", scope: Scope::Unchecked },
    // A library that does not exist ends the session; one that does may change what statements do.
    Setting { name: "local_preload_libraries", value: "", scope: Scope::Start },
    Setting { name: "post_auth_delay", value: "0", scope: Scope::Start },
    Setting { name: "ignore_system_indexes", value: "off", scope: Scope::Start },
];

/// The start-up parameter `options`: `-c name=value` for each setting that a start can give.
#[must_use]
pub fn options() -> String {
    let given = SETTINGS.iter().filter(|setting| setting.scope != Scope::Later);
    given
        .map(|setting| format!("-c {}={}", setting.name, escaped(setting.value)))
        .collect::<Vec<_>>()
        .join(" ")
}

/// White space separates options, unless a backslash precedes it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace(' ', "\\ ")
}

/// One statement that gives the running session every value that can be given later. A setting that the server does not know
/// is left out.
#[must_use]
pub fn set_all() -> String {
    let given = SETTINGS.iter().filter(|setting| setting.scope != Scope::Start);
    let each = given.map(|setting| {
        let name = literal(setting.name);
        let set = format!("pg_catalog.set_config({name}, {}, false)", literal(setting.value));
        // `role` is shown although no list has it; of the others only `Later` can be missing.
        match setting.scope {
            Scope::Later => {
                format!("CASE WHEN pg_catalog.current_setting({name}, true) IS NOT NULL THEN {set} END")
            }
            Scope::Session | Scope::Unchecked | Scope::Start => set,
        }
    });
    format!("SELECT {}", each.collect::<Vec<_>>().join(", "))
}

/// Settings whose value in the session can be compared, in the order of [`current_values`].
pub fn compared() -> impl Iterator<Item = &'static Setting> {
    SETTINGS.iter().filter(|setting| matches!(setting.scope, Scope::Session | Scope::Later))
}

/// SQL expressions for the values of [`compared`], separated by commas; NULL for what the server does not know.
#[must_use]
pub fn current_values() -> String {
    compared()
        .map(|setting| format!("pg_catalog.current_setting({}, true)", literal(setting.name)))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Names and values of the list hold neither quotes nor backslashes.
fn literal(text: &str) -> String {
    format!("'{text}'")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn options_separate_settings_by_spaces_and_escape_those_of_values() {
        let options = options();
        assert!(options.starts_with("-c statement_timeout=0 -c synchronous_commit=on "), "{options}");
        assert!(options.contains(r" -c search_path=public,\ pg_temp -c "), "{options}");
        assert!(options.contains(" -c default_tablespace= -c "), "{options}");
        assert!(!options.contains("transaction_timeout=0 -c exit"), "unknown to older servers: {options}");
    }

    #[test]
    fn what_is_set_later_leaves_out_what_only_a_start_can_give() {
        let sql = set_all();
        assert!(sql.starts_with("SELECT pg_catalog.set_config('statement_timeout', '0', false), "), "{sql}");
        assert!(!sql.contains("post_auth_delay"), "{sql}");
        assert!(
            sql.contains("CASE WHEN pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL")
        );
    }

    #[test]
    fn every_setting_is_there_once_and_needs_no_quoting() {
        let names: BTreeSet<&str> = SETTINGS.iter().map(|setting| setting.name).collect();
        assert_eq!(names.len(), SETTINGS.len());
        assert!(SETTINGS.iter().all(|setting| !setting.value.contains(['\'', '\\', '\t', '\n'])));
        assert_eq!(current_values().matches("current_setting").count(), compared().count());
    }
}
