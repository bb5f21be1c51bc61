//! What lies in the dead-letter queue, and what becomes of it. Pure: no I/O.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};

use super::poison::{REASON_HEADER, STORED_HEADER};

/// How often an event has been put back.
pub const RETURNED_HEADER: &str = "x-tier0-returned";

/// Why the broker itself takes a message out of a queue; none of these judges what is in it. `rejected`: by another
/// consumer of the queue, since ours rejects nothing.
pub const REASONS: [&str; 4] = ["delivery_limit", "expired", "maxlen", "rejected"];

/// Headers by which the broker would send a copy to other queues, and what it noted of earlier deaths.
const NOT_TO_REPEAT: [&str; 7] = [
    "CC",
    "BCC",
    "x-death",
    "x-delivery-count",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
];

const PERSISTENT: u8 = 2;
/// Put back so often, an event may be what ends the consumer.
const SUSPECT: i64 = 3;
const FIRST_PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// What becomes of a message in the dead-letter queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Back to the queue it came from, which the broker took it out of for this reason.
    Return { reason: &'static str, before: i64 },
    /// The same, later.
    Wait { before: i64 },
    /// For people: refused by us, or put here by somebody else.
    Keep,
}

/// A copy of what we refused. Those are published to the dead-letter queue; what the broker moved there was in another queue
/// before, and whatever its headers say of us its publisher has written.
fn is_refused(properties: &BasicProperties) -> bool {
    properties.headers().as_ref().is_some_and(|headers| {
        headers.inner().contains_key(REASON_HEADER) && !headers.inner().contains_key("x-death")
    })
}

/// Nothing is lost with it: a copy of what we refused, whose row was committed before it was published. (Copies of earlier
/// versions do not say so; theirs had rows.)
#[must_use]
pub fn is_to_spare(properties: &BasicProperties) -> bool {
    let stored = properties.headers().as_ref().and_then(|headers| headers.inner().get(STORED_HEADER));
    is_refused(properties) && stored.is_none_or(|stored| *stored == AMQPValue::Boolean(true))
}

/// Decides by what the broker and we noted in the message. `uptime` is how long this process has run: what comes back
/// again and again may be what ends it, so it is tried after a growing time in which everything else gets through.
#[must_use]
pub fn fate(properties: &BasicProperties, queue: &str, uptime: Duration) -> Fate {
    let Some(headers) = properties.headers() else { return Fate::Keep };
    let headers = headers.inner();
    if is_refused(properties) {
        return Fate::Keep;
    }
    // The newest death comes first.
    let Some(AMQPValue::FieldArray(deaths)) = headers.get("x-death") else { return Fate::Keep };
    let Some(AMQPValue::FieldTable(newest)) = deaths.as_slice().first() else { return Fate::Keep };
    let text =
        |key: &str| newest.inner().get(key).and_then(AMQPValue::as_long_string).map(ToString::to_string);
    if text("queue").as_deref() != Some(queue) {
        return Fate::Keep;
    }
    let reason = text("reason");
    let Some(reason) = REASONS.into_iter().find(|known| reason.as_deref() == Some(*known)) else {
        return Fate::Keep;
    };
    let before = match headers.get(RETURNED_HEADER) {
        Some(AMQPValue::LongLongInt(before)) => (*before).max(0),
        _ => 0,
    };
    if uptime < pause(before) { Fate::Wait { before } } else { Fate::Return { reason, before } }
}

/// How long a process must have run before it takes an event that was put back so often.
fn pause(before: i64) -> Duration {
    match u32::try_from((before - SUSPECT).min(8)) {
        Ok(doublings) => FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE),
        Err(_) => Duration::ZERO,
    }
}

/// The properties to publish it with again. Not all: a user id must be that of the publisher, an expiry has passed.
#[must_use]
pub fn again(properties: &BasicProperties, fate: Fate) -> BasicProperties {
    let mut headers = FieldTable::default();
    if let Some(old) = properties.headers() {
        let keeps_death = !matches!(fate, Fate::Return { .. });
        for (key, value) in old.inner() {
            let death = key.as_str() == "x-death";
            if (death && keeps_death) || !NOT_TO_REPEAT.contains(&key.as_str()) {
                headers.insert(key.clone(), value.clone());
            }
        }
    }
    if let Fate::Return { before, .. } = fate {
        headers.insert(RETURNED_HEADER.into(), AMQPValue::LongLongInt(before.saturating_add(1)));
    }
    let mut new = BasicProperties::default().with_delivery_mode(PERSISTENT).with_headers(headers);
    if let Some(value) = properties.content_type() {
        new = new.with_content_type(value.clone());
    }
    if let Some(value) = properties.content_encoding() {
        new = new.with_content_encoding(value.clone());
    }
    if let Some(value) = properties.message_id() {
        new = new.with_message_id(value.clone());
    }
    if let Some(value) = properties.timestamp() {
        new = new.with_timestamp(*value);
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::types::{FieldArray, LongString};

    fn text(text: &str) -> AMQPValue {
        AMQPValue::LongString(LongString::from(text))
    }

    fn dead(reason: &str, queue: &str, more: &[(&str, AMQPValue)]) -> BasicProperties {
        let mut death = FieldTable::default();
        death.insert("reason".into(), text(reason));
        death.insert("queue".into(), text(queue));
        let mut deaths = FieldArray::default();
        deaths.push(AMQPValue::FieldTable(death));
        let mut headers = FieldTable::default();
        headers.insert("x-death".into(), AMQPValue::FieldArray(deaths));
        for (key, value) in more {
            headers.insert((*key).into(), value.clone());
        }
        BasicProperties::default().with_headers(headers)
    }

    #[test]
    fn only_what_the_broker_took_out_of_our_queue_goes_back() {
        let now = |properties: &BasicProperties| fate(properties, "q", Duration::ZERO);
        for reason in REASONS {
            assert_eq!(now(&dead(reason, "q", &[])), Fate::Return { reason, before: 0 });
        }
        assert_eq!(now(&BasicProperties::default()), Fate::Keep);
        assert_eq!(now(&dead("expired", "another", &[])), Fate::Keep);
        assert_eq!(now(&dead("invented", "q", &[])), Fate::Keep);
        // Our copies were never taken out of a queue: its publisher has written that.
        let forged = dead("delivery_limit", "q", &[(REASON_HEADER, text("not_json"))]);
        assert_eq!(now(&forged), Fate::Return { reason: "delivery_limit", before: 0 });
        assert!(!is_to_spare(&forged));
        assert_eq!(now(&copy(&[(REASON_HEADER, text("not_json"))])), Fate::Keep);
    }

    fn copy(headers: &[(&str, AMQPValue)]) -> BasicProperties {
        let mut table = FieldTable::default();
        for (key, value) in headers {
            table.insert((*key).into(), value.clone());
        }
        BasicProperties::default().with_headers(table)
    }

    #[test]
    fn only_a_copy_with_a_row_is_to_spare() {
        let reason = (REASON_HEADER, text("not_json"));
        let stored = |stored| (STORED_HEADER, AMQPValue::Boolean(stored));
        assert!(is_to_spare(&copy(&[reason.clone(), stored(true)])));
        assert!(!is_to_spare(&copy(&[reason.clone(), stored(false)])));
        assert!(!is_to_spare(&copy(&[(STORED_HEADER, text("true")), reason.clone()])));
        assert!(is_to_spare(&copy(&[reason])), "of an earlier version");
        assert!(!is_to_spare(&copy(&[stored(true)])), "not refused by us");
    }

    #[test]
    fn what_comes_back_again_and_again_waits_longer_and_is_never_given_up() {
        let at = |before, seconds| {
            let properties =
                dead("delivery_limit", "q", &[(RETURNED_HEADER, AMQPValue::LongLongInt(before))]);
            matches!(fate(&properties, "q", Duration::from_secs(seconds)), Fate::Return { .. })
        };
        assert!(at(2, 0));
        assert!(!at(3, 59) && at(3, 60));
        assert!(!at(4, 119) && at(4, 120));
        assert!(!at(i64::MAX, 599) && at(i64::MAX, 600));
        assert!(at(-5, 0), "a header anybody may write");
    }

    #[test]
    fn what_is_published_again_reaches_one_queue_and_counts_its_returns() {
        let old = dead("expired", "q", &[("CC", text("elsewhere")), ("mine", text("kept"))])
            .with_user_id("somebody".into())
            .with_expiration("1".into())
            .with_content_type("application/json".into());
        let new = again(&old, Fate::Return { reason: "expired", before: 1 });
        let headers = new.headers().clone().unwrap();
        let keys: Vec<&str> = headers.inner().keys().map(|key| key.as_str()).collect();
        assert_eq!(keys, ["mine", RETURNED_HEADER]);
        assert_eq!(headers.inner()[RETURNED_HEADER], AMQPValue::LongLongInt(2));
        assert_eq!((new.user_id(), new.expiration()), (&None, &None));
        assert_eq!(new.content_type().as_ref().unwrap().as_str(), "application/json");
        let kept = again(&old, Fate::Keep);
        assert!(kept.headers().as_ref().unwrap().inner().contains_key("x-death"));
    }
}
