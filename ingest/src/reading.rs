//! One pass over a payload: JSON in, checked readings out, everything borrowed from the payload.
//!
//! `metrics`, `status`, `location` and `tags` stay the text they arrived as. Nothing is read that is not stored,
//! nothing is dropped: what is not a reading is a [`Rejection`] with its reason. Never panics, whatever the bytes.

mod object;
mod slow;

use std::borrow::Cow;

use wire::topic::Topic;

use crate::dead_letter::Reason;
use crate::decode::{self, Hints, number_text, optional, required, shown, text};
use crate::tolerated::{Tolerances, Tolerated};
use object::{Document, Fields};

pub use crate::decode::{MAX_TEXT_BYTES, Rejection, Rules, Tolerance, unpack};
pub use crate::error_text::MAX_ERROR_BYTES;
pub use slow::element_at;
pub(crate) use slow::elements_at;

/// A checked reading. Times in microseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading<'a> {
    /// Its place in the message's array, from 0; 0 when the message is the reading. See [`element_at`].
    pub element: u32,
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
    /// What was taken although it is not as the contract asks.
    pub tolerated: Tolerances,
}

/// What one message holds, in order.
pub trait Visitor<'a> {
    fn reading(&mut self, reading: &Reading<'_>);
    /// `part` is the text that was refused: the message, or one element of an array.
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection);
    /// Forget everything visited in this message so far: it is visited again from the start.
    fn restart(&mut self);
}

/// Takes a message apart. A single object is one reading; of an array each element is, and a bad one costs only
/// itself, also when it keeps the array from being JSON. An empty array holds nothing and is no error. Returns the topic
/// taken apart, if it is one of ours.
pub fn visit<'a>(
    topic: &'a [u8],
    payload: &'a [u8],
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> Option<Topic<'a>> {
    if payload.len() > rules.max_payload_bytes {
        let error = format!("{} bytes, the limit is {}", payload.len(), rules.max_payload_bytes);
        visitor.rejected(payload, Rejection::new(Reason::TooLarge, error));
        return None;
    }
    let topic = match Topic::parse(topic) {
        Ok(topic) => topic,
        Err(error) => {
            visitor.rejected(payload, Rejection::new(Reason::TopicMismatch, error.to_string()));
            return None;
        }
    };
    if !visit_good(payload, &topic, rules, visitor) {
        // Something in it is wrong. Take it apart again, slowly, to say what and to keep the rest.
        visitor.restart();
        slow::visit(payload, &topic, rules, visitor);
    }
    Some(topic)
}

/// Whether everything in the message is a reading. If not, what was visited is void.
fn visit_good<'a>(
    payload: &'a [u8],
    topic: &Topic<'_>,
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> bool {
    let Ok(text) = std::str::from_utf8(payload) else { return false };
    let hints = Hints::of(payload);
    let (mut element, mut all_good) = (0, true);
    let document = object::read(text, |fields| {
        all_good = all_good
            && match check(&fields, hints, element, topic, rules) {
                Ok(reading) => {
                    visitor.reading(&reading);
                    true
                }
                Err(_) => false,
            };
        element += 1;
    });
    matches!(document, Ok(Document::Object | Document::Array)) && all_good
}

fn check<'a>(
    fields: &Fields<'a>,
    hints: Hints,
    element: u32,
    topic: &Topic<'_>,
    rules: &Rules,
) -> Result<Reading<'a>, Rejection> {
    let mut tolerated = Tolerances::NONE;
    let device_id = id("device_id", fields.device_id, rules, &mut tolerated)?;
    let device_type = id("device_type", fields.device_type, rules, &mut tolerated)?;
    let site_id = id("site_id", fields.site_id, rules, &mut tolerated)?;
    let raw_time = required("timestamp_utc", fields.timestamp_utc)?;
    let (timestamp_us, of_time) = decode::time::read("timestamp_utc", raw_time, Some(&site_id), rules)?;
    tolerated = tolerated.with(of_time);
    let metrics = decode::object("metrics", required("metrics", fields.metrics)?, hints)?;
    let reading = Reading {
        element,
        firmware: optional(fields.firmware.map(|raw| text("firmware", raw)), rules, &mut tolerated)?,
        status: optional(
            fields.status.map(|raw| decode::object("status", raw, hints)),
            rules,
            &mut tolerated,
        )?,
        location: optional(
            fields.location.map(|raw| decode::object("location", raw, hints)),
            rules,
            &mut tolerated,
        )?,
        tags: optional(fields.tags.map(|raw| decode::object("tags", raw, hints)), rules, &mut tolerated)?,
        device_id,
        device_type,
        site_id,
        timestamp_us,
        metrics,
        tolerated,
    };
    for (key, of_topic, of_payload) in [
        ("device_id", topic.device_id, &reading.device_id),
        ("device_type", topic.device_type, &reading.device_type),
        ("site_id", topic.site_id, &reading.site_id),
    ] {
        if of_topic != of_payload.as_ref() {
            let (of_topic, of_payload) = (shown(of_topic), shown(of_payload));
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
        let error = format!("timestamp_utc {} is {side}", shown(raw_time));
        return Err(Rejection::new(Reason::TimestampOutOfRange, error));
    }
    Ok(reading)
}

/// A required text; by setting the text of a number.
fn id<'a>(
    key: &str,
    raw: Option<&'a str>,
    rules: &Rules,
    tolerated: &mut Tolerances,
) -> Result<Cow<'a, str>, Rejection> {
    let raw = required(key, raw)?;
    if rules.tolerance.lenient.numeric_ids
        && let Some(number) = number_text(key, raw)?
    {
        tolerated.add(Tolerated::NumericId);
        return Ok(Cow::Borrowed(number));
    }
    text(key, raw)
}

#[cfg(test)]
mod tests;
