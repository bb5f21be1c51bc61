//! Is every session in the table as the broker's confirms say, on every node?
//!
//! [`compare`] is a pure function of a [`SessionLedger`] and what one node stored; [`read`] asks the node.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::Context;
use jiff::Timestamp;
use serde::Serialize;
use tokio_postgres::{Client, Row};
use wire::sessions::{SessionLedger, SessionState};

/// Sessions listed in a report, of those that differ.
const LISTED: usize = 5;

/// What one node holds of the ledger's sessions and of those newer than its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredSessions {
    pub sessions: BTreeMap<String, SessionState>,
    /// Site reports of the run's span of time.
    pub site_reports: u64,
    /// Dead letters since the start of the run, by reason.
    pub dead_letters: BTreeMap<String, u64>,
}

/// One node held against the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SessionFindings {
    pub node: String,
    /// Confirmed sessions.
    pub sessions: u64,
    /// Of them not in the table.
    pub lost: u64,
    /// In the table, in another state than the newest confirmed one.
    pub differing: u64,
    /// Written during the run, though no confirmed or doubtful message was of them.
    pub extra: u64,
    pub site_reports_lost: u64,
    pub dead_letters_lost: u64,
    pub examples: Vec<String>,
}

impl SessionFindings {
    #[must_use]
    pub fn holds(&self) -> bool {
        self.verdict() == "exact"
    }

    /// `exact`, or what is wrong in a few words.
    #[must_use]
    pub fn verdict(&self) -> String {
        let wrong: Vec<String> = [
            (self.lost, "sessions lost"),
            (self.differing, "sessions differ"),
            (self.extra, "sessions extra"),
            (self.site_reports_lost, "site reports lost"),
            (self.dead_letters_lost, "dead letters of sessions lost"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, text)| format!("{count} {text}"))
        .collect();
        if wrong.is_empty() { "exact".into() } else { wrong.join(", ") }
    }
}

impl fmt::Display for SessionFindings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {} sessions: {}", self.node, self.sessions, self.verdict())?;
        for example in &self.examples {
            write!(f, "\n{:<10} {example}", "")?;
        }
        Ok(())
    }
}

/// Holds what a node stored against the ledger.
#[must_use]
pub fn compare(node: &str, ledger: &SessionLedger, stored: &StoredSessions) -> SessionFindings {
    let mut findings = SessionFindings {
        node: node.to_owned(),
        sessions: ledger.sessions.len() as u64,
        site_reports_lost: ledger.site_reports.saturating_sub(stored.site_reports),
        ..SessionFindings::default()
    };
    for (reason, count) in &ledger.dead_letters {
        let found = stored.dead_letters.get(reason).copied().unwrap_or(0);
        findings.dead_letters_lost += count.saturating_sub(found);
    }
    let doubtful: BTreeSet<&str> = ledger.unknown.iter().map(String::as_str).collect();
    for (id, confirmed) in &ledger.sessions {
        let found = stored.sessions.get(id);
        let agrees = match found {
            None => false,
            // Newer than the snapshot, or than what was confirmed of it: both may be.
            Some(found) if !ledger.complete || doubtful.contains(id.as_str()) => {
                found.last_activity_us >= confirmed.last_activity_us
            }
            Some(found) => same(confirmed, found, ledger.started_us),
        };
        if agrees {
            continue;
        }
        if found.is_none() {
            findings.lost += 1;
        } else {
            findings.differing += 1;
        }
        if findings.examples.len() < LISTED {
            findings.examples.push(format!("{id}: confirmed {confirmed:?}, stored {found:?}"));
        }
    }
    if ledger.complete {
        let span = ledger.started_us..=ledger.ended_us;
        let unasked = stored.sessions.iter().filter(|(id, state)| {
            span.contains(&state.last_activity_us)
                && !ledger.sessions.contains_key(*id)
                && !doubtful.contains(id.as_str())
        });
        findings.extra = unasked.count() as u64;
    }
    findings
}

/// A logout or login of an earlier run with the same seed is not this run's business.
fn same(confirmed: &SessionState, found: &SessionState, started_us: i64) -> bool {
    let earlier = |confirmed: Option<i64>, found: Option<i64>| match confirmed {
        None => found.filter(|us| *us >= started_us),
        Some(_) => found,
    };
    let found = SessionState {
        login_us: earlier(confirmed.login_us, found.login_us),
        logout_us: earlier(confirmed.logout_us, found.logout_us),
        username: found.username.clone().filter(|_| confirmed.username.is_some()),
        ip_address: found.ip_address.clone().filter(|_| confirmed.ip_address.is_some()),
        ..found.clone()
    };
    *confirmed == found
}

/// Reads what one node holds.
///
/// # Errors
/// When the node is lost or lacks the tables.
pub async fn read(client: &Client, ledger: &SessionLedger) -> anyhow::Result<StoredSessions> {
    let started = Timestamp::from_microsecond(ledger.started_us).context("start of the run")?;
    let ended = Timestamp::from_microsecond(ledger.ended_us).context("end of the run")?;
    let ids: Vec<&str> = ledger.sessions.keys().map(String::as_str).collect();
    let rows = client
        .query(
            "SELECT session_id, user_id, connection_status, region, username, ip_address, login_time, logout_time, \
             last_activity FROM user_sessions WHERE session_id = ANY($1::text[]) OR last_activity >= $2",
            &[&ids, &started],
        )
        .await
        .context("read the sessions")?;
    let reports = client
        .query_one(
            "SELECT count(*) FROM site_activity WHERE timestamp_utc BETWEEN $1 AND $2",
            &[&started, &ended],
        )
        .await
        .context("count the site reports")?;
    let letters = client
        .query(
            "SELECT reason, count(*) FROM dead_letters WHERE source = 'rabbitmq' AND received_at >= $1 GROUP BY reason",
            &[&started],
        )
        .await
        .context("count the dead letters")?;
    Ok(StoredSessions {
        sessions: rows.iter().map(state).collect(),
        site_reports: count(&reports, 0),
        dead_letters: letters.iter().map(|row| (row.get(0), count(row, 1))).collect(),
    })
}

fn state(row: &Row) -> (String, SessionState) {
    let us = |column: usize| row.get::<_, Option<Timestamp>>(column).map(Timestamp::as_microsecond);
    let state = SessionState {
        user_id: row.get(1),
        connection_status: row.get(2),
        region: row.get(3),
        username: row.get(4),
        ip_address: row.get(5),
        login_us: us(6),
        logout_us: us(7),
        last_activity_us: row.get::<_, Timestamp>(8).as_microsecond(),
    };
    (row.get(0), state)
}

fn count(row: &Row, column: usize) -> u64 {
    u64::try_from(row.get::<_, i64>(column)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(status: &str, at: i64) -> SessionState {
        SessionState {
            user_id: "u".into(),
            connection_status: status.into(),
            region: Some("EU".into()),
            username: None,
            ip_address: None,
            login_us: Some(10),
            logout_us: None,
            last_activity_us: at,
        }
    }

    fn ledger() -> SessionLedger {
        SessionLedger {
            complete: true,
            started_us: 5,
            ended_us: 100,
            sessions: [("a".to_owned(), state("active", 20)), ("b".to_owned(), state("idle", 30))].into(),
            site_reports: 2,
            dead_letters: [("not_json".to_owned(), 3)].into(),
            ..SessionLedger::default()
        }
    }

    fn stored(change: impl FnOnce(&mut StoredSessions)) -> StoredSessions {
        let mut stored = StoredSessions {
            sessions: ledger().sessions,
            site_reports: 2,
            dead_letters: ledger().dead_letters,
        };
        change(&mut stored);
        stored
    }

    #[test]
    fn every_difference_has_its_verdict() {
        let check = |change: fn(&mut StoredSessions), verdict: &str| {
            let findings = compare("region1", &ledger(), &stored(change));
            assert_eq!((findings.verdict().as_str(), findings.holds()), (verdict, verdict == "exact"));
        };
        check(|_| {}, "exact");
        check(|s| drop(s.sessions.remove("a")), "1 sessions lost");
        check(|s| drop(s.sessions.insert("a".into(), state("idle", 20))), "1 sessions differ");
        check(|s| drop(s.sessions.insert("a".into(), state("active", 19))), "1 sessions differ");
        check(|s| drop(s.sessions.insert("c".into(), state("active", 50))), "1 sessions extra");
        check(|s| drop(s.sessions.insert("c".into(), state("active", 4))), "exact");
        check(|s| s.site_reports = 1, "1 site reports lost");
        check(|s| s.dead_letters.clear(), "3 dead letters of sessions lost");
    }

    #[test]
    fn what_is_in_doubt_may_be_newer_but_not_older() {
        let mut ledger = ledger();
        ledger.unknown = vec!["a".into(), "c".into()];
        let newer = stored(|s| {
            s.sessions.insert("a".into(), state("idle", 40));
            s.sessions.insert("c".into(), state("active", 50));
        });
        assert_eq!(compare("x", &ledger, &newer).verdict(), "exact");
        let older = stored(|s| drop(s.sessions.insert("a".into(), state("active", 19))));
        assert_eq!(compare("x", &ledger, &older).verdict(), "1 sessions differ");
    }
}
