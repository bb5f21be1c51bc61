//! One pass over a payload: JSON in, checked readings out, everything borrowed from the payload.
//!
//! `metrics`, `status`, `location` and `tags` stay the text they arrived as. Nothing is read that is not stored,
//! nothing is dropped: what is not a reading is a [`Rejection`] with its reason. Never panics, whatever the bytes.

mod escapes;
mod object;

use std::borrow::Cow;

use serde_json::value::RawValue;
use wire::topic::Topic;

use crate::dead_letter::Reason;
use crate::timestamp;
use object::{Document, Fields};

/// Longest accepted `device_id`, `device_type`, `site_id` and `firmware`, in bytes. Index rows end at 2,704 bytes; with
/// a larger limit Postgres would refuse what was accepted here.
pub const MAX_TEXT_BYTES: usize = 256;

/// A checked reading. Times in microseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading<'a> {
    pub device_id: Cow<'a, str>,
    pub device_type: Cow<'a, str>,
    pub site_id: Cow<'a, str>,
    pub timestamp_us: i64,
    pub firmware: Option<Cow<'a, str>>,
    /// JSON objects as text.
    pub metrics: &'a str,
    pub status: Option<&'a str>,
    pub location: Option<&'a str>,
    pub tags: Option<&'a str>,
}

/// Why something is not a reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    pub reason: Reason,
    pub error: String,
}

impl Rejection {
    pub(crate) fn new(reason: Reason, error: impl Into<String>) -> Self {
        Self { reason, error: error.into() }
    }
}

/// What a reading must agree with.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Timestamps outside this range (microseconds since 1970) are refused.
    pub oldest_us: i64,
    pub newest_us: i64,
    /// Larger messages are refused unread.
    pub max_payload_bytes: usize,
}

/// What one message holds, in order.
pub trait Visitor<'a> {
    fn reading(&mut self, reading: &Reading<'a>);
    /// `part` is the text that was refused: the message, or one element of an array.
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection);
    /// Forget everything visited in this message so far: it is visited again from the start.
    fn restart(&mut self);
}

/// Takes a message apart. A single object is one reading; of an array each element is, and a bad one costs only
/// itself. An empty array holds nothing and is no error.
pub fn visit<'a>(topic: &'a [u8], payload: &'a [u8], rules: &Rules, visitor: &mut impl Visitor<'a>) {
    if let Err(rejection) = visit_message(topic, payload, rules, visitor) {
        visitor.restart();
        visitor.rejected(payload, rejection);
    }
}

fn visit_message<'a>(
    topic: &'a [u8],
    payload: &'a [u8],
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> Result<(), Rejection> {
    if payload.len() > rules.max_payload_bytes {
        let error = format!("{} bytes, the limit is {}", payload.len(), rules.max_payload_bytes);
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    let topic = Topic::parse(topic).map_err(|e| Rejection::new(Reason::TopicMismatch, e.to_string()))?;
    let text = std::str::from_utf8(payload).map_err(|e| Rejection::new(Reason::NotJson, e.to_string()))?;
    let mut all_good = true;
    let document = object::read(text, |fields| {
        all_good = all_good
            && match check(&fields, &topic, rules) {
                Ok(reading) => {
                    visitor.reading(&reading);
                    true
                }
                Err(_) => false,
            };
    });
    match document {
        Ok(Document::Object | Document::Array) if all_good => Ok(()),
        // Something in it is wrong. Take it apart again, slowly, to say what and to keep the rest.
        _ => {
            visitor.restart();
            visit_slowly(text, &topic, rules, visitor)
        }
    }
}

fn visit_slowly<'a>(
    text: &'a str,
    topic: &Topic<'_>,
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> Result<(), Rejection> {
    let not_json = |error: serde_json::Error| Rejection::new(Reason::NotJson, error.to_string());
    let whole: &RawValue = serde_json::from_str(text).map_err(not_json)?;
    if !whole.get().starts_with('[') {
        let reading = checked_element(whole.get(), topic, rules)?;
        visitor.reading(&reading);
        return Ok(());
    }
    let elements: Vec<&'a RawValue> = serde_json::from_str(text).map_err(not_json)?;
    for (index, element) in elements.into_iter().enumerate() {
        match checked_element(element.get(), topic, rules) {
            Ok(reading) => visitor.reading(&reading),
            Err(rejection) => {
                let error = format!("element {index}: {}", rejection.error);
                visitor.rejected(element.get().as_bytes(), Rejection { error, ..rejection });
            }
        }
    }
    Ok(())
}

/// The text of the reading of this time in a message that was visited before: the message, or an element. All readings
/// of a message are of one device, so the time says which.
#[must_use]
pub fn part_at<'a>(topic: &[u8], payload: &'a [u8], rules: &Rules, timestamp_us: i64) -> &'a [u8] {
    let element = || {
        let topic = Topic::parse(topic).ok()?;
        let elements: Vec<&'a RawValue> = serde_json::from_slice(payload).ok()?;
        let of_that_time = |element: &&'a RawValue| {
            checked_element(element.get(), &topic, rules)
                .is_ok_and(|reading| reading.timestamp_us == timestamp_us)
        };
        Some(elements.into_iter().find(of_that_time)?.get().as_bytes())
    };
    element().unwrap_or(payload)
}

fn checked_element<'a>(element: &'a str, topic: &Topic<'_>, rules: &Rules) -> Result<Reading<'a>, Rejection> {
    if !element.starts_with('{') {
        return Err(Rejection::new(Reason::WrongType, "a reading is a JSON object"));
    }
    let mut outcome = None;
    object::read(element, |fields| outcome = Some(check(&fields, topic, rules)))
        .map_err(|error| Rejection::new(Reason::NotJson, error.to_string()))?;
    outcome.unwrap_or_else(|| Err(Rejection::new(Reason::NotJson, "no object")))
}

fn check<'a>(fields: &Fields<'a>, topic: &Topic<'_>, rules: &Rules) -> Result<Reading<'a>, Rejection> {
    let device_id = text("device_id", required("device_id", fields.device_id)?)?;
    let device_type = text("device_type", required("device_type", fields.device_type)?)?;
    let site_id = text("site_id", required("site_id", fields.site_id)?)?;
    let time = text("timestamp_utc", required("timestamp_utc", fields.timestamp_utc)?)?;
    let metrics = object("metrics", required("metrics", fields.metrics)?)?;
    let timestamp_us = timestamp::parse(time.as_bytes()).ok_or_else(|| {
        Rejection::new(
            Reason::WrongType,
            "timestamp_utc is not an RFC 3339 time such as 2026-02-03T04:05:06.789Z",
        )
    })?;
    let reading = Reading {
        firmware: fields.firmware.map(|raw| text("firmware", raw)).transpose()?,
        status: fields.status.map(|raw| object("status", raw)).transpose()?,
        location: fields.location.map(|raw| object("location", raw)).transpose()?,
        tags: fields.tags.map(|raw| object("tags", raw)).transpose()?,
        device_id,
        device_type,
        site_id,
        timestamp_us,
        metrics,
    };
    for (key, of_topic, of_payload) in [
        ("device_id", topic.device_id, &reading.device_id),
        ("device_type", topic.device_type, &reading.device_type),
        ("site_id", topic.site_id, &reading.site_id),
    ] {
        if of_topic != of_payload.as_ref() {
            let error = format!("{key}: the topic says {of_topic}, the payload {of_payload}");
            return Err(Rejection::new(Reason::TopicMismatch, error));
        }
    }
    if timestamp_us < rules.oldest_us || timestamp_us > rules.newest_us {
        let side = if timestamp_us < rules.oldest_us {
            "older than the retention"
        } else {
            "too far ahead of the clock"
        };
        return Err(Rejection::new(Reason::TimestampOutOfRange, format!("timestamp_utc {time} is {side}")));
    }
    Ok(reading)
}

pub(crate) fn required<'a>(key: &str, raw: Option<&'a str>) -> Result<&'a str, Rejection> {
    raw.ok_or_else(|| Rejection::new(Reason::MissingField, format!("{key} is missing")))
}

/// A JSON string as text: borrowed unless it holds escapes.
pub(crate) fn text<'a>(key: &str, raw: &'a str) -> Result<Cow<'a, str>, Rejection> {
    let Some(inner) = raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
        return Err(Rejection::new(Reason::WrongType, format!("{key} is not a string")));
    };
    if inner.len() > MAX_TEXT_BYTES {
        let error = format!("{key} has {} bytes, the limit is {MAX_TEXT_BYTES}", inner.len());
        return Err(Rejection::new(Reason::TooLarge, error));
    }
    if inner.is_empty() {
        return Err(Rejection::new(Reason::WrongType, format!("{key} is empty")));
    }
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Ok(Cow::Borrowed(inner));
    }
    let owned: String = serde_json::from_str(raw)
        .map_err(|error| Rejection::new(Reason::RejectedByDatabase, format!("{key}: {error}")))?;
    if owned.contains('\0') {
        return Err(Rejection::new(Reason::RejectedByDatabase, format!("{key} holds a NUL character")));
    }
    Ok(Cow::Owned(owned))
}

/// A JSON object as the text it arrived as, if jsonb can hold it.
pub(crate) fn object<'a>(key: &str, raw: &'a str) -> Result<&'a str, Rejection> {
    if !raw.starts_with('{') {
        return Err(Rejection::new(Reason::WrongType, format!("{key} is not an object")));
    }
    match escapes::refused_by_jsonb(raw.as_bytes()) {
        None => Ok(raw),
        Some(error) => Err(Rejection::new(Reason::RejectedByDatabase, format!("{key}: {error}"))),
    }
}

#[cfg(test)]
mod tests;
