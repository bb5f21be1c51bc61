//! Folding in any order, decoding, and what is refused.

use std::borrow::Cow;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::dead_letter::Reason;
use crate::reading::{MAX_ERROR_BYTES, Rejection, Rules};
use crate::tolerated::{Tolerances, Tolerated};

fn rules() -> Rules {
    Rules::new(0, 1_800_000_000_000_000, 10_000)
}

#[derive(Default)]
struct Seen {
    sessions: Vec<(String, Session)>,
    sites: Vec<(String, i64, String)>,
    rejected: Vec<(String, Reason)>,
    tolerated: Tolerances,
}

impl<'a> Visitor<'a> for Seen {
    fn session(&mut self, session_id: Cow<'_, str>, session: Session) {
        self.sessions.push((session_id.into_owned(), session));
    }
    fn site(&mut self, site_id: Cow<'_, str>, timestamp_us: i64, metrics: &str) {
        self.sites.push((site_id.into_owned(), timestamp_us, metrics.to_owned()));
    }
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        assert!(!rejection.error.is_empty() && rejection.error.len() <= MAX_ERROR_BYTES);
        self.rejected.push((String::from_utf8_lossy(part).into_owned(), rejection.reason));
    }
    fn tolerated(&mut self, tolerances: Tolerances) {
        self.tolerated = self.tolerated.with(tolerances);
    }
}

fn seen(payload: &str) -> Seen {
    let mut seen = Seen::default();
    visit(payload.as_bytes(), &rules(), &mut seen);
    seen
}

const EVENT: &str = r#"{"user_id":"user_0042","session_id":"SESS-1","event":"active","connection_status":"active","region":"NA-WEST","timestamp":"2026-02-03T04:05:06Z"}"#;
const AT: i64 = 1_770_091_506_000_000;

fn of(payload: &str) -> Session {
    let mut seen = seen(payload);
    assert_eq!(seen.rejected, [], "{payload}");
    seen.sessions.pop().unwrap().1
}

#[test]
fn the_life_of_a_session_reads_from_its_events() {
    let event = |event: &str, status: &str, second: u32| {
        let text = EVENT.replace("\"event\":\"active\"", &format!("\"event\":\"{event}\""));
        let text =
            text.replace("\"connection_status\":\"active\"", &format!("\"connection_status\":\"{status}\""));
        of(&text.replace(":06Z", &format!(":{second:02}Z")))
    };
    let mut session = event("login", "active", 6);
    assert_eq!((session.login_us, session.newest.status), (Some(AT), Status::Active));
    session.merge(event("idle", "idle", 7));
    assert_eq!((session.login_us, session.newest.status), (Some(AT), Status::Idle));
    // Whatever status a logout claims, it ends the session.
    session.merge(event("logout", "active", 9));
    assert_eq!(
        (session.newest.status, session.logout_time_us()),
        (Status::Disconnected, Some(AT + 3_000_000))
    );
    let ended = session.clone();
    session.merge(event("active", "active", 8));
    assert_eq!(session, ended, "a late event changes nothing");
    session.merge(event("active", "active", 10));
    assert_eq!((session.newest.status, session.logout_time_us()), (Status::Active, None), "in use again");
}

#[test]
fn a_report_is_its_entries_and_its_load() {
    let report = r#"{"message_id":"m","timestamp_utc":"2026-02-03T04:05:06Z","site_id":"SFO-WEB-01",
        "metrics":{"active_users":3},"active_users_list":[
        {"user_id":"u1","username":"ann","session_id":"S1","login_time":"2026-02-03T04:00:06Z","ip_address":"10.0.0.1","region":"EU","connection_status":"idle"},
        {"user_id":"u2","session_id":"S2","connection_status":"asleep"},
        17,
        {"user_id":"u3","session_id":"S3","connection_status":"active","username":null}],
        "queue_metadata":{"x":1}}"#;
    let seen = seen(report);
    assert_eq!(seen.sites, [("SFO-WEB-01".into(), AT, r#"{"active_users":3}"#.into())]);
    let ids: Vec<&str> = seen.sessions.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(ids, ["S1", "S3"]);
    let first = &seen.sessions[0].1;
    assert_eq!(first.newest, Newest { at_us: AT, status: Status::Idle, user_id: "u1".into() });
    assert_eq!(first.username, Some((AT, "ann".into())));
    assert_eq!(first.login_us, Some(AT - 300_000_000));
    assert_eq!(seen.sessions[1].1.username, None);
    let reasons: Vec<Reason> = seen.rejected.iter().map(|(_, reason)| *reason).collect();
    assert_eq!(reasons, [Reason::WrongType, Reason::WrongType]);
    assert_eq!(seen.rejected[1].0, "17");
}

#[test]
fn a_report_keeps_its_good_entries_when_a_bad_one_breaks_it() {
    let entry = |id: &str| format!(r#"{{"user_id":"u","session_id":"{id}","connection_status":"idle"}}"#);
    let (first, last) = (entry("S1"), entry("S3"));
    for bad in ["{\"session_id\":NaN}", "{\"session_id\":\"S2", "x", "{,}", ""] {
        let report = format!(
            r#"{{"timestamp_utc":"2026-02-03T04:05:06Z","metrics":{{"active_users":3}},
            "active_users_list":[{first},{bad},{last}],"site_id":"W"}}"#
        );
        let seen = seen(&report);
        let ids: Vec<&str> = seen.sessions.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!((ids, seen.sites.len()), (vec!["S1", "S3"], 1), "{report}");
        assert_eq!(seen.rejected, [(bad.to_owned(), Reason::NotJson)], "{report}");
    }
    // Cut off, after all that the report needs.
    let report = format!(
        r#"{{"timestamp_utc":"2026-02-03T04:05:06Z","metrics":{{}},"site_id":"W","active_users_list":[{first},{{"user"#
    );
    let seen = seen(&report);
    assert_eq!((seen.sessions.len(), seen.sites.len()), (1, 1));
    assert_eq!(seen.rejected, [("{\"user".to_owned(), Reason::NotJson)]);
    // The list is closed too early: what follows might be entries.
    let early = format!(
        r#"{{"timestamp_utc":"2026-02-03T04:05:06Z","metrics":{{}},"site_id":"W","active_users_list":[{first},x],{last}]}}"#
    );
    assert_eq!(self::seen(&early).rejected, [(early, Reason::NotJson)]);
    // What the report itself needs is not JSON: all of it is refused.
    let report = report.replace("\"metrics\":{}", "\"metrics\":{x}");
    assert_eq!(self::seen(&report).rejected, [(report, Reason::NotJson)]);
}

#[test]
fn what_is_tolerated_in_events_is_said() {
    for (from, to, what) in [
        ("\"NA-WEST\"", "{}", Tolerated::FieldDropped),
        ("\"2026-02-03T04:05:06Z\"", "1770091506", Tolerated::EpochTime),
        ("06Z", "06+00", Tolerated::Iso8601),
        ("06Z", "06", Tolerated::NoZone),
    ] {
        let seen = seen(&EVENT.replacen(from, to, 1));
        assert_eq!((seen.sessions.len(), seen.sessions[0].1.newest.at_us), (1, AT), "{to}");
        assert!(seen.tolerated.contains(what), "{to}");
    }
    assert!(seen(EVENT).tolerated.is_empty());
}

#[test]
fn no_error_text_grows_with_the_message() {
    let long = "x".repeat(9_000);
    for (from, to) in [
        ("\"active\",\"connection", &format!("\"{}\",\"connection", &long[..250])),
        ("\"SESS-1\"", &format!("\"{long}\"")),
        ("\"SESS-1\"", &format!("[\"{long}\"]")),
        ("2026-02-03T04:05:06Z", &long),
        (EVENT, &format!("\"{long}\"")),
        ("\"NA-WEST\"", &format!("\"{long}\"")),
    ] {
        let payload = EVENT.replacen(from, to, 1);
        assert_eq!(seen(&payload).rejected.len(), 1, "{to}");
    }
}

#[test]
fn what_is_refused_has_its_reason() {
    for (from, to, reason) in [
        ("}", "", Reason::NotJson),
        ("\"user_id\":\"user_0042\",", "", Reason::MissingField),
        ("\"SESS-1\"", "null", Reason::MissingField),
        ("\"SESS-1\"", "17", Reason::WrongType),
        ("\"SESS-1\"", "\"\"", Reason::WrongType),
        ("\"SESS-1\"", "\"a\\u0000b\"", Reason::RejectedByDatabase),
        ("\"event\":\"active\"", "\"event\":\"left\"", Reason::WrongType),
        ("\"connection_status\":\"active\"", "\"connection_status\":\"gone\"", Reason::WrongType),
        ("2026-02-03T04:05:06Z", "yesterday", Reason::WrongType),
        ("2026-", "2099-", Reason::TimestampOutOfRange),
        (EVENT, "[]", Reason::WrongType),
        (EVENT, "17", Reason::WrongType),
        (EVENT, "", Reason::NotJson),
        (
            EVENT,
            r#"{"active_users_list":{},"site_id":"S","timestamp_utc":"2026-02-03T04:05:06Z","metrics":{}}"#,
            Reason::WrongType,
        ),
        (
            EVENT,
            r#"{"active_users_list":[],"timestamp_utc":"2026-02-03T04:05:06Z","metrics":{}}"#,
            Reason::MissingField,
        ),
        (
            EVENT,
            r#"{"active_users_list":[],"site_id":"S","timestamp_utc":"2026-02-03T04:05:06Z","metrics":7}"#,
            Reason::WrongType,
        ),
    ] {
        let payload = EVENT.replacen(from, to, 1);
        let seen = seen(&payload);
        assert_eq!(seen.rejected, [(payload.clone(), reason)], "{payload}");
        assert!(seen.sessions.is_empty() && seen.sites.is_empty(), "{payload}");
    }
    assert_eq!(seen(&"x".repeat(10_001)).rejected[0].1, Reason::TooLarge);
}

/// Few values, so that ties and repetitions are common.
pub(crate) fn any_session() -> impl Strategy<Value = Session> {
    let detail = || prop::option::of((0..4_i64, prop::sample::select(vec!["", "a", "b", "B", "é"])));
    let newest =
        (0..4_i64, prop::sample::select(Status::ALL.to_vec()), prop::sample::select(vec!["u1", "u2"]));
    let times = (prop::option::of(0..4_i64), prop::option::of(0..4_i64));
    (newest, detail(), detail(), detail(), times).prop_map(
        |((at_us, status, user), a, b, c, (login_us, logout_us))| {
            let detail = |detail: Option<(i64, &str)>| detail.map(|(at_us, text)| (at_us, text.into()));
            Session {
                newest: Newest { at_us, status, user_id: user.into() },
                username: detail(a),
                region: detail(b),
                ip_address: detail(c),
                login_us,
                logout_us,
            }
        },
    )
}

fn merged(mut first: Session, second: &Session) -> Session {
    first.merge(second.clone());
    first
}

proptest! {
    #[test]
    fn merging_is_commutative_associative_and_idempotent(a in any_session(), b in any_session(), c in any_session()) {
        prop_assert_eq!(merged(a.clone(), &b), merged(b.clone(), &a));
        prop_assert_eq!(merged(merged(a.clone(), &b), &c), merged(a.clone(), &merged(b, &c)));
        prop_assert_eq!(merged(a.clone(), &a), a);
    }

    /// Batches are folded on their own and then merged, as writers and the table do.
    #[test]
    fn any_order_repetition_and_batching_leaves_the_same_sessions(
        (events, shuffled) in prop::collection::vec((0..3_u8, any_session()), 1..30).prop_flat_map(|events| {
            let repeated: Vec<_> = events.iter().cloned().chain(events.iter().rev().step_by(2).cloned()).collect();
            (Just(events), Just(repeated).prop_shuffle())
        }),
        width in 1..10_usize,
    ) {
        let fold = |events: &[(u8, Session)]| {
            let mut sessions: BTreeMap<u8, Session> = BTreeMap::new();
            for (id, session) in events {
                sessions.entry(*id).and_modify(|known| known.merge(session.clone())).or_insert(session.clone());
            }
            sessions
        };
        let mut table: BTreeMap<u8, Session> = BTreeMap::new();
        for batch in shuffled.chunks(width) {
            for (id, session) in fold(batch) {
                table.entry(id).and_modify(|known| known.merge(session.clone())).or_insert(session);
            }
        }
        prop_assert_eq!(table, fold(&events));
    }

    #[test]
    fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        visit(&bytes, &rules(), &mut Seen::default());
    }

    #[test]
    fn a_broken_message_is_one_rejection_or_none(at in 0..EVENT.len(), byte in any::<u8>()) {
        let mut bytes = EVENT.as_bytes().to_vec();
        bytes[at] = byte;
        let mut seen = Seen::default();
        visit(&bytes, &rules(), &mut seen);
        prop_assert_eq!(seen.sessions.len() + seen.rejected.len(), 1);
    }
}
