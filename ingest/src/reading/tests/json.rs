//! Our decoder and serde_json agree on what is JSON.

use super::*;
use crate::decode::elements::{Elements, Piece};

/// Commas that are missing, or one too many at the end, cost nothing.
fn mendable(payload: &[u8]) -> bool {
    let elements: Vec<&[u8]> = Elements::of(payload)
        .into_iter()
        .flatten()
        .map(|piece| match piece {
            Piece::Element { text, .. } => text,
            Piece::After(_) | Piece::Unclosed(_) => b"?",
        })
        .collect();
    is_json(&[b"[", elements.join(&b","[..]).as_slice(), b"]"].concat())
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
        if payload.starts_with(b"[") {
            // What is good in an array that is not JSON is kept; what is bad is refused, if anything is.
            let refused = !seen.rejected.is_empty();
            assert!(
                refused || is_json(&payload) || mendable(&payload),
                "{:?}",
                String::from_utf8_lossy(&payload)
            );
            continue;
        }
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
