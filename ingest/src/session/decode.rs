//! One pass over a message: what it says of sessions and of a site. Never panics, whatever the bytes; nothing is dropped,
//! what cannot be used is a [`Rejection`] with its reason.
//!
//! Two shapes, told apart by their fields: with `active_users_list` it is a site report, else one event.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::{Detail, Newest, Session, Status, fields};
use crate::dead_letter::Reason;
use crate::reading::{Rejection, Rules, object, required, text};
use crate::timestamp;

/// Entries of one list. A site has fewer users at once; a longer list is refused as a whole, since each entry may become a
/// dead letter many times its size.
const MAX_ENTRIES: usize = 10_000;

/// What one message holds, in order.
pub trait Visitor<'a> {
    fn session(&mut self, session_id: Cow<'a, str>, session: Session);
    /// The load of a site; `metrics` is a JSON object as text.
    fn site(&mut self, site_id: Cow<'a, str>, timestamp_us: i64, metrics: &'a str);
    /// `part` is the text that was refused: the message, or one entry of its list.
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection);
}

/// Takes a message apart. A bad entry of a list costs only itself.
pub fn visit<'a>(payload: &'a [u8], rules: &Rules, visitor: &mut impl Visitor<'a>) {
    if let Err(rejection) = visit_message(payload, rules, visitor) {
        visitor.rejected(payload, rejection);
    }
}

fn visit_message<'a>(
    payload: &'a [u8],
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> Result<(), Rejection> {
    if payload.len() > rules.max_payload_bytes {
        let error = format!("{} bytes, the limit is {}", payload.len(), rules.max_payload_bytes);
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    let message = std::str::from_utf8(payload).map_err(|e| Rejection::new(Reason::NotJson, e.to_string()))?;
    let [list, site_id, time, metrics] =
        read(message, &["active_users_list", "site_id", "timestamp_utc", "metrics"])?;
    let Some(list) = list else {
        let (session_id, session) = event(message, rules)?;
        visitor.session(session_id, session);
        return Ok(());
    };
    // Everything that can be wrong with the report is found before anything of it is handed over.
    let site_id = text("site_id", required("site_id", site_id)?)?;
    let at_us = moment("timestamp_utc", required("timestamp_utc", time)?, rules)?;
    let metrics = object("metrics", required("metrics", metrics)?)?;
    if !list.starts_with('[') {
        return Err(Rejection::new(Reason::WrongType, "active_users_list is not an array"));
    }
    let entries: Vec<&'a RawValue> = serde_json::from_str(list).map_err(not_json)?;
    if entries.len() > MAX_ENTRIES {
        let error = format!("active_users_list has {} entries, the limit is {MAX_ENTRIES}", entries.len());
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    visitor.site(site_id, at_us, metrics);
    for (index, raw) in entries.into_iter().enumerate() {
        match entry(raw.get(), at_us, rules) {
            Ok((session_id, session)) => visitor.session(session_id, session),
            Err(rejection) => {
                let error = format!("active_users_list, entry {index}: {}", rejection.error);
                visitor.rejected(raw.get().as_bytes(), Rejection { error, ..rejection });
            }
        }
    }
    Ok(())
}

/// One event of one session.
fn event<'a>(message: &'a str, rules: &Rules) -> Result<(Cow<'a, str>, Session), Rejection> {
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
    let at_us = moment("timestamp", required("timestamp", time)?, rules)?;
    let (login, logout) = match event.as_ref() {
        "login" => (true, false),
        "active" | "idle" => (false, false),
        "logout" => (false, true),
        _ => {
            let error = format!("event {event:?} is none of login, active, idle, logout");
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
        username: detail("username", username, at_us)?,
        region: detail("region", region, at_us)?,
        ip_address: detail("ip_address", ip_address, at_us)?,
        login_us: login.then_some(at_us),
        logout_us: logout.then_some(at_us),
    };
    Ok((session_id, session))
}

/// One entry of a site report made at `at_us`.
fn entry<'a>(entry: &'a str, at_us: i64, rules: &Rules) -> Result<(Cow<'a, str>, Session), Rejection> {
    let names =
        ["session_id", "user_id", "connection_status", "login_time", "username", "region", "ip_address"];
    let [session_id, user_id, status, login, username, region, ip_address] = read(entry, &names)?;
    let session_id = text("session_id", required("session_id", session_id)?)?;
    let user_id = text("user_id", required("user_id", user_id)?)?;
    let status = self::status(required("connection_status", status)?)?;
    let session = Session {
        newest: Newest { at_us, status, user_id: user_id.into() },
        username: detail("username", username, at_us)?,
        region: detail("region", region, at_us)?,
        ip_address: detail("ip_address", ip_address, at_us)?,
        login_us: login.map(|raw| moment("login_time", raw, rules)).transpose()?,
        logout_us: None,
    };
    Ok((session_id, session))
}

fn read<'a, const N: usize>(object: &'a str, names: &[&str; N]) -> Result<[Option<&'a str>; N], Rejection> {
    fields::read(object, names).map_err(|error| {
        // Valid JSON of another kind is not broken JSON.
        if error.is_data() && !object.trim_start().starts_with('{') {
            return Rejection::new(Reason::WrongType, "not a JSON object");
        }
        not_json(error)
    })
}

fn not_json(error: serde_json::Error) -> Rejection {
    Rejection::new(Reason::NotJson, error.to_string())
}

fn status(raw: &str) -> Result<Status, Rejection> {
    let status = text("connection_status", raw)?;
    Status::parse(&status).ok_or_else(|| {
        let error = format!("connection_status {status:?} is none of active, idle, disconnected");
        Rejection::new(Reason::WrongType, error)
    })
}

fn detail(key: &str, raw: Option<&str>, at_us: i64) -> Result<Detail, Rejection> {
    raw.map(|raw| Ok((at_us, text(key, raw)?.into()))).transpose()
}

/// A time as microseconds since 1970. A session has no retention, so an old one is as good as any; but one from the
/// future would be the newest until then.
fn moment(key: &str, raw: &str, rules: &Rules) -> Result<i64, Rejection> {
    let time = text(key, raw)?;
    let at_us = timestamp::parse(time.as_bytes()).ok_or_else(|| {
        let error = format!("{key} is not an RFC 3339 time such as 2026-02-03T04:05:06.789Z");
        Rejection::new(Reason::WrongType, error)
    })?;
    if at_us > rules.newest_us {
        let error = format!("{key} {time} is too far ahead of the clock");
        return Err(Rejection::new(Reason::TimestampOutOfRange, error));
    }
    Ok(at_us)
}
