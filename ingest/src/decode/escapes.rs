//! Escapes that are valid JSON but that jsonb refuses.

/// Why Postgres would refuse this (valid) JSON text as jsonb, as far as escapes are concerned.
pub(super) fn refused(json: &[u8]) -> Option<&'static str> {
    let mut rest = json;
    let mut after_high = false;
    while let Some(at) = memchr::memchr(b'\\', rest) {
        if after_high && at != 0 {
            return Some("a high surrogate without its low one");
        }
        let escape = rest.get(at + 1..)?;
        let (unit, length) = match escape {
            [b'u', a, b, c, d, ..] => (Some(code_unit([*a, *b, *c, *d])?), 5),
            _ => (None, 1),
        };
        match unit {
            Some(0) => return Some("\\u0000 cannot be stored"),
            Some(0xd800..=0xdbff) if !after_high => after_high = true,
            Some(0xdc00..=0xdfff) if after_high => after_high = false,
            Some(0xdc00..=0xdfff) => return Some("a low surrogate without its high one"),
            _ if after_high => return Some("a high surrogate without its low one"),
            _ => {}
        }
        rest = escape.get(length..)?;
    }
    after_high.then_some("a high surrogate without its low one")
}

fn code_unit(digits: [u8; 4]) -> Option<u32> {
    digits.iter().try_fold(0, |sum, digit| Some(sum * 16 + char::from(*digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_jsonb_refuses_and_nothing_else() {
        for (json, expected) in [
            (r#"{"a":"b"}"#, false),
            (r#"{"a":"\n\"\\u0000"}"#, false),
            (r#"{"a":"\\\u0000"}"#, true),
            (r#"{"a":"\u0000"}"#, true),
            (r#"{"\u0000":1}"#, true),
            (r#"{"a":"\u00e9"}"#, false),
            (r#"{"a":"\ud83d\ude00"}"#, false),
            (r#"{"a":"\uD83D\uDE00\ud83d\ude00"}"#, false),
            (r#"{"a":"\ud83d"}"#, true),
            (r#"{"a":"\ud83dx\ude00"}"#, true),
            (r#"{"a":"\ud83d\n"}"#, true),
            (r#"{"a":"\ude00"}"#, true),
            (r#"{"a":"\ud83d\ud83d\ude00"}"#, true),
        ] {
            assert_eq!(refused(json.as_bytes()).is_some(), expected, "{json}");
        }
    }
}
