//! What is taken beyond the contract, and counted.

use bytes::Bytes;

use super::*;
use crate::settings::{IngestSettings, LenientSettings, NoZone, TimestampSettings};
use crate::tolerated::Tolerated;

const TIME: &str = "\"2026-02-03T04:05:06.789Z\"";
const TIME_US: i64 = 1_770_091_506_789_000;

fn with(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replace(from, to)
}

/// A reading by default, with what was tolerated; none when nothing is.
fn check(payload: &str, tolerated: &[Tolerated]) -> Reading<'static> {
    let mut seen = seen_by(Tolerance::default(), TOPIC, payload.as_bytes());
    assert_eq!((seen.readings.len(), &seen.rejected), (1, &vec![]), "{payload}");
    let reading = seen.readings.remove(0);
    for what in Tolerated::ALL {
        assert_eq!(reading.tolerated.contains(what), tolerated.contains(&what), "{what:?}: {payload}");
    }
    if tolerated != [Tolerated::NoZone] && !tolerated.is_empty() {
        assert!(self::seen(TOPIC, payload.as_bytes()).readings.is_empty(), "{payload}");
    }
    reading
}

#[test]
fn times_in_other_forms_are_the_same_times() {
    for (time, us) in [
        ("1770091506.789", TIME_US),
        ("\"1770091506.789\"", TIME_US),
        ("1770091506789", TIME_US),
        ("1770091506789000", TIME_US),
        ("1770091506789000000", TIME_US),
        ("1.770091506789e9", TIME_US),
        ("1770091506", TIME_US - 789_000),
    ] {
        assert_eq!(check(&with(TIME, time), &[Tolerated::EpochTime]).timestamp_us, us);
    }
    for time in ["2026-02-03T05:05:06,789+0100", "2026-02-03T05:05:06.789+01", "20260203T040506.789Z"] {
        let reading = check(&with(TIME, &format!("\"{time}\"")), &[Tolerated::Iso8601]);
        assert_eq!(reading.timestamp_us, TIME_US);
    }
    check(&with("06.789Z", "06.789"), &[Tolerated::NoZone]);
    check(&with("2026-02-03T04:05:06.789Z", "2026-02-03T04:05"), &[Tolerated::NoZone, Tolerated::Iso8601]);
}

#[test]
fn numbers_that_are_no_times_are_refused() {
    for time in ["0", "17", "123456", "-1770091506", "1e400", "true", "null", "{}", "\"\"", "\"20260203\""] {
        let payload = with(TIME, time);
        let seen = seen_by(Tolerance::default(), TOPIC, payload.as_bytes());
        assert_eq!(seen.rejected[0].1.reason, Reason::WrongType, "{time}: {}", seen.rejected[0].1.error);
    }
}

#[test]
fn a_time_without_a_zone_follows_the_setting() {
    let payload = with("06.789Z", "06.789");
    let time = |no_zone, zones: &str| {
        let timestamps = TimestampSettings { no_zone, zones: zones.into(), ..TimestampSettings::default() };
        let settings = IngestSettings { timestamps, ..IngestSettings::default() };
        let mut seen = seen_by(Tolerance::new(&settings), TOPIC, payload.as_bytes());
        match seen.readings.pop() {
            Some(reading) => Ok(reading.timestamp_us),
            None => Err(seen.rejected.remove(0).1.error),
        }
    };
    assert_eq!(time(NoZone::Utc, ""), Ok(TIME_US));
    assert!(time(NoZone::Refuse, "").unwrap_err().contains("has no zone"));
    assert_eq!(time(NoZone::Site, "TX-EAGLE=America/Chicago"), Ok(TIME_US + 6 * 3_600_000_000));
    assert!(time(NoZone::Site, "WY-ALPHA=America/Denver").unwrap_err().contains("zones"));
}

#[test]
fn ids_may_be_numbers_that_agree_with_the_topic() {
    let payload = with("\"TURB-00417\"", "417");
    let seen = seen_by(Tolerance::default(), b"og/field/TX-EAGLE/turbine/417", payload.as_bytes());
    assert_eq!(seen.readings[0].device_id, "417");
    assert!(seen.readings[0].tolerated.contains(Tolerated::NumericId));
    let seen = seen_by(Tolerance::default(), TOPIC, payload.as_bytes());
    assert_eq!(seen.rejected[0].1.reason, Reason::TopicMismatch);
    for (id, reason) in [("true".to_owned(), Reason::WrongType), ("4".repeat(300), Reason::TooLarge)] {
        let payload = with("\"TURB-00417\"", &id);
        assert_eq!(seen_by(Tolerance::default(), TOPIC, payload.as_bytes()).rejected[0].1.reason, reason);
    }
}

#[test]
fn an_optional_field_of_a_wrong_type_is_left_out() {
    for (from, to) in [
        ("\"3.4.1\"", "3.4"),
        ("\"3.4.1\"", "\"\""),
        ("\"3.4.1\"", "[1]"),
        (r#"{"vendor":"GE","loop":"B2"}"#, "[1]"),
        (r#"{"lat":31.2319,"lon":-101.8752}"#, "\"31.2319,-101.8752\""),
        (r#"{"state":"OK","code":"TURB-OK","message":"Nominal"}"#, "\"OK\""),
    ] {
        let reading = check(&with(from, to), &[Tolerated::FieldDropped]);
        let left = [
            reading.firmware.is_some(),
            reading.status.is_some(),
            reading.location.is_some(),
            reading.tags.is_some(),
        ];
        assert_eq!(left.iter().filter(|there| **there).count(), 3, "{from} {to}");
    }
    // What is more than a wrong type still costs the reading: nothing of a good type is dropped.
    let payload = with("\"B2\"", "\"\\u0000\"");
    assert_eq!(
        seen_by(Tolerance::default(), TOPIC, payload.as_bytes()).rejected[0].1.reason,
        Reason::RejectedByDatabase
    );
    let payload = with("{\"rpm\":3412,\"inlet_temp_c\":401.7,\"vibration_mm_s\":2.3}", "[]");
    assert_eq!(
        seen_by(Tolerance::default(), TOPIC, payload.as_bytes()).rejected[0].1.reason,
        Reason::WrongType
    );
}

#[test]
fn not_a_number_becomes_null_when_that_is_asked_for() {
    let bad = with("3412", "NaN").replace("401.7", "-Infinity").replace("Nominal", "NaN");
    let seen = seen_by(Tolerance::default(), TOPIC, bad.as_bytes());
    assert_eq!(seen.rejected[0].1.reason, Reason::NotJson);
    let tolerance = || {
        let lenient = LenientSettings { non_finite_as_null: true, ..LenientSettings::default() };
        Tolerance::new(&IngestSettings { lenient, ..IngestSettings::default() })
    };
    let array = format!("[{GOOD},{bad}]");
    for (payload, count) in [(&bad, 1), (&array, 2)] {
        let seen = seen_by(tolerance(), TOPIC, payload.as_bytes());
        assert_eq!((seen.readings.len(), seen.rejected.len()), (count, 0));
        let last = &seen.readings[count - 1];
        assert_eq!(last.metrics, r#"{"rpm":null,"inlet_temp_c":null,"vibration_mm_s":2.3}"#);
        assert_eq!(last.status, Some(r#"{"state":"OK","code":"TURB-OK","message":"NaN"}"#));
        assert!(last.tolerated.contains(Tolerated::NonFinite));
    }
    let seen = seen_by(tolerance(), TOPIC, b"{\"device_id\":NaN,x}");
    assert_eq!(seen.rejected[0].1.reason, Reason::NotJson);
}

#[test]
fn a_mark_before_and_padding_behind_are_taken_off() {
    let padded = |text: &[u8]| {
        let mut payload = Bytes::copy_from_slice(text);
        let tolerated = unpack(&mut payload, &rules(Tolerance::default())).unwrap();
        (payload, tolerated.contains(Tolerated::Padding))
    };
    assert_eq!(padded(b"\xef\xbb\xbf{}"), ("{}".into(), true));
    assert_eq!(padded(b"{}\0\0 \n\0\n"), ("{}".into(), true));
    assert_eq!(padded(b"{} \n"), ("{} \n".into(), false));
    assert_eq!(padded(b"{}"), ("{}".into(), false));
    assert_eq!(padded(b"\0\0"), ("\0\0".into(), false));
    assert_eq!(padded(b"\0{}"), ("\0{}".into(), false));
}
