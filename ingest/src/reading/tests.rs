//! Messages and what comes of them.

mod broken;
mod json;
mod lenient;
mod page;

use std::ops::Add;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

const TOPIC: &[u8] = b"og/field/TX-EAGLE/turbine/TURB-00417";
fn rules(tolerance: Tolerance) -> Rules {
    let (oldest_us, newest_us) = (1_770_000_000_000_000, 1_771_000_000_000_000);
    Rules { tolerance: Arc::new(tolerance), ..Rules::new(oldest_us, newest_us, 256 << 10) }
}
const GOOD: &str = r#"{"device_id":"TURB-00417","device_type":"turbine","site_id":"TX-EAGLE",
 "timestamp_utc":"2026-02-03T04:05:06.789Z","firmware":"3.4.1",
 "metrics":{"rpm":3412,"inlet_temp_c":401.7,"vibration_mm_s":2.3},
 "status":{"state":"OK","code":"TURB-OK","message":"Nominal"},
 "location":{"lat":31.2319,"lon":-101.8752},"tags":{"vendor":"GE","loop":"B2"}}"#;

/// What a visitor was told, in the order of the message.
#[derive(Default)]
struct Seen<'a> {
    readings: Vec<Reading<'static>>,
    rejected: Vec<(&'a [u8], Rejection)>,
}

impl<'a> Visitor<'a> for Seen<'a> {
    fn reading(&mut self, reading: &Reading<'_>) {
        let owned = |text: &Cow<'_, str>| Cow::Owned(text.as_ref().to_owned());
        let document = |text: &str| &*text.to_owned().leak();
        self.readings.push(Reading {
            device_id: owned(&reading.device_id),
            device_type: owned(&reading.device_type),
            site_id: owned(&reading.site_id),
            firmware: reading.firmware.as_ref().map(owned),
            metrics: document(reading.metrics),
            status: reading.status.map(document),
            location: reading.location.map(document),
            tags: reading.tags.map(document),
            ..*reading
        });
    }
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        assert!(rejection.error.len() <= MAX_ERROR_BYTES);
        self.rejected.push((part, rejection));
    }
    fn restart(&mut self) {
        *self = Self::default();
    }
}

fn seen_by<'a>(tolerance: Tolerance, topic: &'a [u8], payload: &'a [u8]) -> Seen<'a> {
    let mut seen = Seen::default();
    visit(topic, payload, &rules(tolerance), &mut seen);
    seen
}

fn seen<'a>(topic: &'a [u8], payload: &'a [u8]) -> Seen<'a> {
    seen_by(Tolerance::strict(), topic, payload)
}

/// One message that is not a reading, and why.
fn check(payload: &str, reason: Reason, named: &str) {
    let seen = seen(TOPIC, payload.as_bytes());
    assert!(seen.readings.is_empty(), "{payload}");
    let [(part, rejection)] = seen.rejected.as_slice() else { panic!("{payload}: {:?}", seen.rejected) };
    assert_eq!(rejection.reason, reason, "{payload}: {}", rejection.error);
    assert!(rejection.error.contains(named), "{payload}: {}", rejection.error);
    assert_eq!(*part, payload.as_bytes());
}

#[test]
fn the_payload_of_the_contract_is_a_reading() {
    let seen = seen(TOPIC, GOOD.as_bytes());
    let [reading] = seen.readings.as_slice() else { panic!("{:?}", seen.rejected) };
    assert_eq!(reading.device_id, "TURB-00417");
    assert_eq!(reading.timestamp_us, 1_770_091_506_789_000);
    assert_eq!(reading.metrics, r#"{"rpm":3412,"inlet_temp_c":401.7,"vibration_mm_s":2.3}"#);
    assert_eq!(reading.tags, Some(r#"{"vendor":"GE","loop":"B2"}"#));
}

#[test]
fn what_is_not_a_reading_says_why() {
    let with = |from: &str, to: &str| {
        assert!(GOOD.contains(from), "{from}");
        GOOD.replace(from, to)
    };
    check("", Reason::NotJson, "EOF");
    check("{", Reason::NotJson, "EOF");
    check(&format!("{GOOD}x"), Reason::NotJson, "trailing");
    check("nul", Reason::NotJson, "");
    check("17", Reason::WrongType, "object");
    check("1e999", Reason::WrongType, "object");
    check("\"x\"", Reason::WrongType, "object");
    check("{}", Reason::MissingField, "device_id");
    check(&with(r#""site_id":"TX-EAGLE","#, ""), Reason::MissingField, "site_id");
    check(&with(r#""TURB-00417""#, "17"), Reason::WrongType, "device_id is the number 17, not a string");
    check(&with(r#""TURB-00417""#, "null"), Reason::WrongType, "device_id");
    check(&with(r#""TURB-00417""#, "\"\""), Reason::WrongType, "device_id");
    check(&with(r#""3.4.1""#, "3.4"), Reason::WrongType, "firmware");
    check(&with(r#"{"vendor":"GE","loop":"B2"}"#, "[1]"), Reason::WrongType, "tags");
    check(&with("2026-02-03T04", "2026-02-30T04"), Reason::WrongType, "timestamp_utc");
    check(
        &with("2026-02-03T04:05:06.789Z", "yesterday"),
        Reason::WrongType,
        "timestamp_utc is \"yesterday\", not an RFC 3339",
    );
    check(
        &with("\"2026-02-03T04:05:06.789Z\"", "17"),
        Reason::WrongType,
        "timestamp_utc is the number 17, not an RFC 3339",
    );
    check(
        &with(r#"{"rpm":3412,"inlet_temp_c":401.7,"vibration_mm_s":2.3}"#, "3412"),
        Reason::WrongType,
        "metrics is the number 3412, not an object",
    );
    check(&with("3412", "1e400"), Reason::RejectedByDatabase, "metrics: 1e400 is more than double");
    check(&with("31.2319", "1E-7600"), Reason::RejectedByDatabase, "location: 1E-7600");
    check(
        &with("\"B2\"", &"[".repeat(1_100).add(&"]".repeat(1_100))),
        Reason::RejectedByDatabase,
        "tags: nested more than 1024",
    );
    check(&with("2026-02-03", "1970-01-01"), Reason::TimestampOutOfRange, "1970");
    check(&with("2026-02-03", "2099-01-01"), Reason::TimestampOutOfRange, "2099");
    check(&with("TURB-00417", "TURB-00418"), Reason::TopicMismatch, "TURB-00418");
    check(&with("TX-EAGLE", "TX-EAGLF"), Reason::TopicMismatch, "site_id");
    check(&with("TURB-00417", &"T".repeat(10_000)), Reason::TooLarge, "device_id");
    check(&with("Nominal", "a\\u0000b"), Reason::RejectedByDatabase, "u0000");
    check(&with("TURB-00417", "TURB\\u0000"), Reason::RejectedByDatabase, "NUL");
    check(&with("Nominal", "\\ud800"), Reason::RejectedByDatabase, "surrogate");
    check(&with("Nominal", "a\tb"), Reason::NotJson, "control");
    check(&" ".repeat((256 << 10) + 1), Reason::TooLarge, "bytes");
}

#[test]
fn a_topic_that_is_not_ours_is_a_mismatch() {
    let long = format!("og/field/{}/turbine/TURB-00417", "S".repeat(60_000));
    for topic in [
        &b"og/field/TX-EAGLE"[..],
        b"other/TX-EAGLE/turbine/TURB-00417",
        b"og/field/\xff/turbine/x",
        long.as_bytes(),
    ] {
        let array = format!("[{}]", [GOOD; 10].join(","));
        let seen = seen(topic, array.as_bytes());
        assert_eq!(seen.rejected.len(), 1, "one letter, whatever the message holds");
        assert_eq!(seen.rejected[0].1.reason, Reason::TopicMismatch);
        assert!(seen.rejected[0].1.error.len() < 100);
    }
}

#[test]
fn odd_but_valid_documents_are_readings() {
    let with = |from: &str, to: &str| GOOD.replace(from, to);
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(500), "]".repeat(500));
    for payload in [
        with("\"TURB-00417\"", "\"TURB-\\u00300417\""),
        with("{\"device_id\"", "{\"extra\":[{}],\"device_id\":17,\"device_id\""),
        with("3412", "1e308"),
        with("3412", "-0.000000000000000000000000001"),
        with("{\"vendor\":\"GE\",\"loop\":\"B2\"}", "null"),
        with("{\"vendor\":\"GE\",\"loop\":\"B2\"}", &deep),
        with("{\"rpm\":3412,\"inlet_temp_c\":401.7,\"vibration_mm_s\":2.3}", "{}"),
        with("Nominal", "日本 \\ud83d\\ude00 \u{1f600}"),
        format!("\n\t {GOOD} \r\n"),
    ] {
        let seen = seen(TOPIC, payload.as_bytes());
        assert_eq!((seen.readings.len(), seen.rejected), (1, vec![]), "{payload}");
        assert_eq!(seen.readings[0].device_id, "TURB-00417");
    }
}

#[test]
fn a_bad_element_of_an_array_costs_only_itself() {
    let later = GOOD.replace("04:05:06", "04:05:07");
    let bad = GOOD.replace("\"turbine\"", "17");
    let payload = format!("[{GOOD},{bad},1e999,{later}, null]");
    let seen = seen(TOPIC, payload.as_bytes());
    assert_eq!(seen.readings.len(), 2);
    let reasons: Vec<_> = seen.rejected.iter().map(|(part, r)| (*part, r.reason, r.error.as_str())).collect();
    assert_eq!(
        reasons,
        [
            (bad.as_bytes(), Reason::WrongType, "element 1: device_type is the number 17, not a string"),
            (&b"1e999"[..], Reason::WrongType, "element 2: a reading is a JSON object, not the number 1e999"),
            (b"null", Reason::WrongType, "element 4: a reading is a JSON object, not null"),
        ]
    );
    let none = self::seen(TOPIC, b"[]");
    assert!(none.readings.is_empty() && none.rejected.is_empty());
}

proptest! {
    #[test]
    fn never_panics_and_loses_nothing(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let seen = seen(TOPIC, &bytes);
        let nothing = decode::trimmed(&bytes).strip_prefix(b"[").is_some_and(|rest| decode::trimmed(rest).starts_with(b"]"));
        prop_assert!(seen.readings.len() + seen.rejected.len() >= 1 || nothing);
    }

    #[test]
    fn a_damaged_payload_is_a_reading_or_a_rejection(at in 0..GOOD.len(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut payload = GOOD.as_bytes().to_vec();
        if cut { payload.truncate(at) } else { payload[at] = byte }
        let seen = seen(TOPIC, &payload);
        prop_assert_eq!(seen.readings.len() + seen.rejected.len(), 1);
    }
}
