//! What the words of Postgres and its tools say about why a standby does not come back: only some of it is cured by
//! rewriting its data.

use crate::protocol::Code;

/// Words and what they mean; the first that is found counts. What no copy cures comes first: the same log may name a
/// consequence too.
const SYMPTOMS: [(&str, Code); 32] = [
    ("No space left on device", Code::Space),
    ("Disk quota exceeded", Code::Space),
    ("Read-only file system", Code::Space),
    ("Input/output error", Code::Space),
    ("password authentication failed", Code::Access),
    ("authentication failed for user", Code::Access),
    ("no pg_hba.conf entry", Code::Access),
    ("permission denied", Code::Access),
    ("is not permitted to log in", Code::Access),
    ("must be superuser or replication role", Code::Access),
    ("exceeds max_wal_senders", Code::Connections),
    ("too many clients already", Code::Connections),
    ("remaining connection slots are reserved", Code::Connections),
    ("too many connections for role", Code::Connections),
    ("all replication slots are in use", Code::Connections),
    ("is active for PID", Code::Connections),
    ("database system is starting up", Code::NotStreaming),
    ("not yet accepting connections", Code::NotStreaming),
    ("database system is shutting down", Code::NotStreaming),
    ("database system identifier differs", Code::Failed),
    ("are from different systems", Code::Failed),
    ("has already been removed", Code::WalGone),
    ("has been invalidated", Code::WalGone),
    ("can no longer get changes from replication slot", Code::WalGone),
    ("is not in this server's history", Code::Diverged),
    ("forked off current database system timeline", Code::Diverged),
    ("is not a child of this server's history", Code::Diverged),
    ("is ahead of the WAL flush position of this server", Code::Ahead),
    ("could not locate a valid checkpoint record", Code::Damaged),
    ("could not locate required checkpoint record", Code::Damaged),
    ("invalid checkpoint record", Code::Damaged),
    ("incorrect checksum in control file", Code::Damaged),
];

/// The same for `pg_rewind`, of what is not in the list above.
const REWIND: [(&str, Code); 7] = [
    ("on the same timeline", Code::Unrewindable),
    ("could not find common ancestor", Code::Unrewindable),
    ("could not find previous WAL record", Code::Unrewindable),
    ("could not read WAL record", Code::Unrewindable),
    ("needs to use either data checksums", Code::Unrewindable),
    ("single-user mode in target cluster failed", Code::Damaged),
    ("could not open file", Code::Unrewindable),
];

fn first(text: &str, known: &[(&str, Code)]) -> Option<Code> {
    known.iter().find(|(words, _)| text.contains(words)).map(|(_, code)| *code)
}

/// What the end of Postgres' log says.
#[must_use]
pub fn of_log(text: &str) -> Option<Code> {
    first(text, &SYMPTOMS)
}

/// What a tool said that failed.
#[must_use]
pub fn of_tool(text: &str) -> Code {
    of_log(text).or_else(|| first(text, &REWIND)).unwrap_or(Code::Failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Rejoin;

    #[test]
    fn only_what_a_copy_cures_leads_to_one() {
        for (said, cure) in [
            (
                "FATAL:  could not connect to the primary server: FATAL:  number of requested standby connections exceeds max_wal_senders (currently 4)",
                None,
            ),
            ("FATAL:  could not write to file \"pg_wal/xlogtemp.7\": No space left on device", None),
            ("FATAL:  password authentication failed for user \"replicator\"", None),
            ("FATAL:  the database system is not yet accepting connections", None),
            (
                "FATAL:  could not receive data from WAL stream: ERROR:  requested WAL segment 000000010000000000000003 has already been removed",
                Some(Rejoin::Clone),
            ),
            (
                "LOG:  new timeline 3 forked off current database system timeline 2 before current recovery point 0/5000060",
                Some(Rejoin::Rewind),
            ),
            ("PANIC:  could not locate a valid checkpoint record", Some(Rejoin::Clone)),
            // Full, and therefore without a checkpoint: a copy would not fit either.
            ("No space left on device; PANIC:  could not locate a valid checkpoint record", None),
            ("something that nobody knows", None),
        ] {
            assert_eq!(of_log(said).and_then(|code| code.cure(Rejoin::Follow)), cure, "{said}");
        }
        for (said, cure) in [
            ("pg_rewind: error: could not find previous WAL record at 0/3000060", Some(Rejoin::Clone)),
            (
                "could not fetch remote file \"global/pg_control\": ERROR:  permission denied for function pg_read_binary_file",
                None,
            ),
            (
                "pg_rewind: error: connection to server at \"127.0.0.1\" failed: FATAL:  sorry, too many clients already",
                None,
            ),
            ("pg_rewind: error: source and target clusters are from different systems", None),
            ("something that nobody knows", None),
        ] {
            assert_eq!(of_tool(said).cure(Rejoin::Rewind), cure, "{said}");
        }
    }
}
