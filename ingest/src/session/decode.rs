//! One pass over a message: what it says of sessions and of a site. Never panics, whatever the bytes; nothing is dropped,
//! what cannot be used is a [`Rejection`] with its reason.
//!
//! Two shapes, told apart by their fields: with `active_users_list` it is a site report, else one event.

use std::borrow::Cow;

use super::broken::{self, Broken};
use super::{Detail, Newest, Session, Status, fields};
use crate::dead_letter::Reason;
use crate::decode::elements::{Elements, Piece};
use crate::decode::{
    self, Hints, Rejection, Rules, described, not_json, object, required, shown, text, utf8, wrong_type,
};
use crate::tolerated::Tolerances;

/// Entries of one list. A site has fewer users at once; a longer list is refused as a whole, since each entry may become a
/// dead letter many times its size.
const MAX_ENTRIES: usize = 10_000;

/// What one message holds, in order.
pub trait Visitor<'a> {
    fn session(&mut self, session_id: Cow<'_, str>, session: Session);
    /// The load of a site; `metrics` is a JSON object as text.
    fn site(&mut self, site_id: Cow<'_, str>, timestamp_us: i64, metrics: &str);
    /// `part` is the text that was refused: the message, or one entry of its list.
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection);
    /// What was taken of the session or site before although it is not as the contract asks.
    fn tolerated(&mut self, _: Tolerances) {}
}

/// Takes a message apart. A bad entry of a list costs only itself, also when it keeps the message from being JSON.
pub fn visit<'a>(payload: &'a [u8], rules: &Rules, visitor: &mut impl Visitor<'a>) {
    if let Err(rejection) = visit_message(payload, rules, visitor) {
        visitor.rejected(payload, rejection);
    }
}

/// What a site report consists of.
#[derive(Debug)]
struct Report<'a, 'r> {
    /// The list of sessions; need not be JSON as a whole, and may be followed by what is after it.
    list: &'a [u8],
    site_id: Option<&'r str>,
    time: Option<&'r str>,
    metrics: Option<&'r str>,
}

const LIST: &str = "active_users_list";
const REPORT: [&str; 4] = [LIST, "site_id", "timestamp_utc", "metrics"];

fn visit_message<'a>(
    payload: &'a [u8],
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> Result<(), Rejection> {
    if payload.len() > rules.max_payload_bytes {
        let error = format!("{} bytes, the limit is {}", payload.len(), rules.max_payload_bytes);
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    match utf8(payload).and_then(|message| Ok((message, read(message, &REPORT)?))) {
        Ok((_, [Some(list), site_id, time, metrics])) => {
            visit_report(&Report { list: list.as_bytes(), site_id, time, metrics }, rules, visitor)
        }
        Ok((message, _)) => {
            let (session_id, session, tolerated) = event(message, rules)?;
            visitor.session(session_id, session);
            visitor.tolerated(tolerated);
            Ok(())
        }
        Err(rejection) => {
            // If nothing but the list is broken, its good entries are kept.
            let Some(Broken { list, rest }) = broken::split(payload, LIST) else { return Err(rejection) };
            let Ok([_, site_id, time, metrics]) = read(&rest, &REPORT) else { return Err(rejection) };
            visit_report(&Report { list, site_id, time, metrics }, rules, visitor).map_err(|_| rejection)
        }
    }
}

fn visit_report<'a>(
    report: &Report<'a, '_>,
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> Result<(), Rejection> {
    // Everything that can be wrong with the report is found before anything of it is handed over.
    let site_id = text("site_id", required("site_id", report.site_id)?)?;
    let raw_time = required("timestamp_utc", report.time)?;
    let (at_us, tolerated) = moment("timestamp_utc", raw_time, Some(&site_id), rules)?;
    let metrics = object("metrics", required("metrics", report.metrics)?, Hints::ANY)?;
    let Some(entries) = Elements::of(report.list) else {
        return Err(wrong_type("active_users_list", utf8(report.list)?, "an array"));
    };
    let count = entries.take(MAX_ENTRIES + 1).count();
    if count > MAX_ENTRIES {
        let error = format!("active_users_list has more than {MAX_ENTRIES} entries, which is the limit");
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    visitor.site(site_id.clone(), at_us, metrics);
    visitor.tolerated(tolerated);
    for piece in Elements::of(report.list).into_iter().flatten() {
        match piece {
            Piece::Element { index, text } => match entry(text, at_us, &site_id, rules) {
                Ok((session_id, session, tolerated)) => {
                    visitor.session(session_id, session);
                    visitor.tolerated(tolerated);
                }
                Err(rejection) => {
                    visitor.rejected(text, rejection.at(format_args!("active_users_list, entry {index}")));
                }
            },
            // The report's other fields, when the list has broken it.
            Piece::After(_) => {}
            Piece::Unclosed(rest) => {
                visitor
                    .rejected(rest, not_json(format!("active_users_list is cut off after {count} entries")));
            }
        }
    }
    Ok(())
}

/// One event of one session.
fn event<'a>(message: &'a str, rules: &Rules) -> Result<(Cow<'a, str>, Session, Tolerances), Rejection> {
    let names = [
        "session_id",
        "user_id",
        "event",
        "connection_status",
        "timestamp",
        "username",
        "region",
        "ip_address",
    ];
    let [session_id, user_id, event, status, time, username, region, ip_address] = read(message, &names)?;
    let session_id = text("session_id", required("session_id", session_id)?)?;
    let user_id = text("user_id", required("user_id", user_id)?)?;
    let event = text("event", required("event", event)?)?;
    let status = self::status(required("connection_status", status)?)?;
    let (at_us, mut tolerated) = moment("timestamp", required("timestamp", time)?, None, rules)?;
    let (login, logout) = match event.as_ref() {
        "login" => (true, false),
        "active" | "idle" => (false, false),
        "logout" => (false, true),
        _ => {
            let error = format!("event is \"{}\", none of login, active, idle, logout", shown(&event));
            return Err(Rejection::new(Reason::WrongType, error));
        }
    };
    let session = Session {
        // Who has logged out is gone, whatever else the message says.
        newest: Newest {
            at_us,
            status: if logout { Status::Disconnected } else { status },
            user_id: user_id.into(),
        },
        username: detail("username", username, at_us, rules, &mut tolerated)?,
        region: detail("region", region, at_us, rules, &mut tolerated)?,
        ip_address: detail("ip_address", ip_address, at_us, rules, &mut tolerated)?,
        login_us: login.then_some(at_us),
        logout_us: logout.then_some(at_us),
    };
    Ok((session_id, session, tolerated))
}

/// One entry of a site report made at `at_us`.
fn entry<'a>(
    entry: &'a [u8],
    at_us: i64,
    site_id: &str,
    rules: &Rules,
) -> Result<(Cow<'a, str>, Session, Tolerances), Rejection> {
    let names =
        ["session_id", "user_id", "connection_status", "login_time", "username", "region", "ip_address"];
    let [session_id, user_id, status, login, username, region, ip_address] = read(utf8(entry)?, &names)?;
    let session_id = text("session_id", required("session_id", session_id)?)?;
    let user_id = text("user_id", required("user_id", user_id)?)?;
    let status = self::status(required("connection_status", status)?)?;
    let (login_us, mut tolerated) = match login {
        Some(raw) => {
            let (login_us, tolerated) = moment("login_time", raw, Some(site_id), rules)?;
            (Some(login_us), tolerated)
        }
        None => (None, Tolerances::NONE),
    };
    let session = Session {
        newest: Newest { at_us, status, user_id: user_id.into() },
        username: detail("username", username, at_us, rules, &mut tolerated)?,
        region: detail("region", region, at_us, rules, &mut tolerated)?,
        ip_address: detail("ip_address", ip_address, at_us, rules, &mut tolerated)?,
        login_us,
        logout_us: None,
    };
    Ok((session_id, session, tolerated))
}

fn read<'a, const N: usize>(object: &'a str, names: &[&str; N]) -> Result<[Option<&'a str>; N], Rejection> {
    fields::read(object, names).map_err(|error| {
        // Valid JSON of another kind is not broken JSON.
        let object = object.trim_start();
        if error.is_data() && !object.starts_with('{') {
            return Rejection::new(Reason::WrongType, format!("not a JSON object but {}", described(object)));
        }
        not_json(error)
    })
}

fn status(raw: &str) -> Result<Status, Rejection> {
    let status = text("connection_status", raw)?;
    Status::parse(&status).ok_or_else(|| {
        let error =
            format!("connection_status is \"{}\", none of active, idle, disconnected", shown(&status));
        Rejection::new(Reason::WrongType, error)
    })
}

/// An optional text; by setting left out when its type is wrong.
fn detail(
    key: &str,
    raw: Option<&str>,
    at_us: i64,
    rules: &Rules,
    tolerated: &mut Tolerances,
) -> Result<Detail, Rejection> {
    let detail = decode::optional(raw.map(|raw| text(key, raw)), rules, tolerated)?;
    Ok(detail.map(|detail| (at_us, detail.into())))
}

/// A time as microseconds since 1970. A session has no retention, so an old one is as good as any; but one from the
/// future would be the newest until then.
fn moment(
    key: &str,
    raw: &str,
    site_id: Option<&str>,
    rules: &Rules,
) -> Result<(i64, Tolerances), Rejection> {
    let (at_us, tolerated) = decode::time::read(key, raw, site_id, rules)?;
    if at_us > rules.newest_us {
        let error = format!("{key} {} is too far ahead of the clock", shown(raw));
        return Err(Rejection::new(Reason::TimestampOutOfRange, error));
    }
    Ok((at_us, tolerated))
}
