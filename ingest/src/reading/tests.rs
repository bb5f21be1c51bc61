use super::*;
use proptest::prelude::*;

const TOPIC: &[u8] = b"og/field/TX-EAGLE/turbine/TURB-00417";
const RULES: Rules = Rules {
    oldest_us: 1_770_000_000_000_000,
    newest_us: 1_771_000_000_000_000,
    max_payload_bytes: 256 << 10,
};
const GOOD: &str = r#"{"device_id":"TURB-00417","device_type":"turbine","site_id":"TX-EAGLE",
 "timestamp_utc":"2026-02-03T04:05:06.789Z","firmware":"3.4.1",
 "metrics":{"rpm":3412,"inlet_temp_c":401.7,"vibration_mm_s":2.3},
 "status":{"state":"OK","code":"TURB-OK","message":"Nominal"},
 "location":{"lat":31.2319,"lon":-101.8752},"tags":{"vendor":"GE","loop":"B2"}}"#;

#[derive(Default)]
struct Seen<'a> {
    readings: Vec<Reading<'a>>,
    rejected: Vec<(&'a [u8], Rejection)>,
}

impl<'a> Visitor<'a> for Seen<'a> {
    fn reading(&mut self, reading: &Reading<'a>) {
        self.readings.push(reading.clone());
    }
    fn rejected(&mut self, part: &'a [u8], rejection: Rejection) {
        self.rejected.push((part, rejection));
    }
    fn restart(&mut self) {
        *self = Self::default();
    }
}

fn seen<'a>(topic: &'a [u8], payload: &'a [u8]) -> Seen<'a> {
    let mut seen = Seen::default();
    visit(topic, payload, &RULES, &mut seen);
    seen
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
    check(&with(r#""TURB-00417""#, "17"), Reason::WrongType, "device_id");
    check(&with(r#""TURB-00417""#, "null"), Reason::WrongType, "device_id");
    check(&with(r#""TURB-00417""#, "\"\""), Reason::WrongType, "device_id");
    check(&with(r#""3.4.1""#, "3.4"), Reason::WrongType, "firmware");
    check(&with(r#"{"vendor":"GE","loop":"B2"}"#, "[1]"), Reason::WrongType, "tags");
    check(&with("2026-02-03T04", "2026-02-30T04"), Reason::WrongType, "timestamp_utc");
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
    for topic in [&b"og/field/TX-EAGLE"[..], b"other/TX-EAGLE/turbine/TURB-00417", b"og/field/\xff/turbine/x"]
    {
        let seen = seen(topic, GOOD.as_bytes());
        assert_eq!(seen.rejected[0].1.reason, Reason::TopicMismatch);
    }
}

#[test]
fn odd_but_valid_documents_are_readings() {
    let with = |from: &str, to: &str| GOOD.replace(from, to);
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(500), "]".repeat(500));
    for payload in [
        with("\"TURB-00417\"", "\"TURB-\\u00300417\""),
        with("{\"device_id\"", "{\"extra\":[{}],\"device_id\":17,\"device_id\""),
        with("3412", "1e400"),
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
            (bad.as_bytes(), Reason::WrongType, "element 1: device_type is not a string"),
            (&b"1e999"[..], Reason::WrongType, "element 2: a reading is a JSON object"),
            (b"null", Reason::WrongType, "element 4: a reading is a JSON object"),
        ]
    );
    check(&format!("[{GOOD},"), Reason::NotJson, "EOF");
    let none = self::seen(TOPIC, b"[]");
    assert!(none.readings.is_empty() && none.rejected.is_empty());
}

proptest! {
    #[test]
    fn never_panics_and_loses_nothing(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let seen = seen(TOPIC, &bytes);
        prop_assert!(seen.readings.len() + seen.rejected.len() >= 1);
    }

    #[test]
    fn a_damaged_payload_is_a_reading_or_a_rejection(at in 0..GOOD.len(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut payload = GOOD.as_bytes().to_vec();
        if cut { payload.truncate(at) } else { payload[at] = byte }
        let seen = seen(TOPIC, &payload);
        prop_assert_eq!(seen.readings.len() + seen.rejected.len(), 1);
    }
}

/// Whether serde_json takes the bytes for a JSON document.
fn is_json(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

/// Our decoder and serde_json agree on what is JSON, wherever in a message it stands.
fn agree(document: &[u8]) {
    let inside = |before: &str, after: &str| [before.as_bytes(), document, after.as_bytes()].concat();
    let (start, end) = GOOD.split_at(GOOD.len() - 1);
    let (metric_start, metric_end) = GOOD.split_once("3412").unwrap();
    for payload in [
        document.to_vec(),
        inside(&format!("{start},\"more\":"), end),
        inside(metric_start, metric_end),
        inside(&format!("[{GOOD},"), "]"),
    ] {
        let seen = seen(TOPIC, &payload);
        let refused_as_json = seen.rejected.iter().any(|(_, rejection)| rejection.reason == Reason::NotJson);
        assert_eq!(refused_as_json, !is_json(&payload), "{:?}", String::from_utf8_lossy(&payload));
    }
}

#[test]
fn agrees_with_serde_json_on_tricky_documents() {
    let deep = format!("{}{}", "[".repeat(2_000), "]".repeat(2_000));
    let unclosed = "[".repeat(2_000);
    for document in [
        "0",
        "-0",
        "-",
        "+1",
        "01",
        "-01",
        "1.",
        ".1",
        "1.0",
        "1e5",
        "1E+5",
        "1e",
        "1e+",
        "0x10",
        "1_000",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e-999",
        "123456789012345678901234567890",
        "true",
        "True",
        "tru",
        "truee",
        "null",
        "nul",
        "\"\"",
        "\"",
        "\"a",
        "'a'",
        "\"\\\"",
        "\"\\a\"",
        "\"\\u12\"",
        "\"\\u12g4\"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"\\ud83d\\ude00\"",
        "\"\\x41\"",
        "\"\t\"",
        "\"\u{0}\"",
        "\"\u{7f}\"",
        "\"\u{2028}\"",
        "\"\u{feff}\"",
        "\u{feff}1",
        "[]",
        "[,]",
        "[1,]",
        "[1 2]",
        "[1,,2]",
        "[",
        "]",
        "[[]",
        "[1]]",
        "{}",
        "{,}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{\"a\" 1}",
        "{a:1}",
        "{1:1}",
        "{\"a\":1,\"a\":2}",
        "{\"\":1}",
        "{\"a\":1}}",
        "{",
        "}",
        "",
        " ",
        "\n",
        "\u{a0}1",
        "1 ",
        " 1",
        "1\u{0}",
        "/**/1",
        "1//",
        "#",
        "[1]#",
        "{\"a\":/*x*/1}",
        "\u{c}1",
        "1\u{b}",
        &deep,
        &unclosed,
    ] {
        agree(document.as_bytes());
    }
    for bytes in
        [&b"\xff"[..], b"\"\xff\"", b"\"\xc0\x80\"", b"\"\xed\xa0\x80\"", b"\"\xe2\x82\"", b"\xef\xbb\xbf1"]
    {
        agree(bytes);
    }
}

proptest! {
    #[test]
    fn agrees_with_serde_json_on_anything_like_json(document in r#"[\[\]{}:,"\\u0-9a-fA-FtrulsenE+\-. \n]{0,24}"#) {
        agree(document.as_bytes());
    }

    #[test]
    fn agrees_with_serde_json_on_damaged_readings(at in 0..GOOD.len(), byte in any::<u8>(), insert in any::<bool>()) {
        let mut payload = GOOD.as_bytes().to_vec();
        if insert { payload.insert(at, byte) } else { payload[at] = byte }
        agree(&payload);
    }
}
