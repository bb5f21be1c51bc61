//! NaN and Infinity, which JSON does not have and which many printers of floating-point numbers write.

/// The text with NaN, Infinity and -Infinity outside of strings replaced by null; `None` when there are none. At most 4/3 as
/// long.
pub(crate) fn as_null(text: &str) -> Option<String> {
    let mut mended = String::new();
    let (mut kept, mut at, mut in_string) = (0, 0, false);
    let bytes = text.as_bytes();
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'N' | b'I' | b'-' if !in_string => {
                let rest = text.get(at..).unwrap_or_default();
                if let Some(word) =
                    ["NaN", "Infinity", "-Infinity", "-NaN"].into_iter().find(|word| rest.starts_with(word))
                {
                    mended.push_str(text.get(kept..at).unwrap_or_default());
                    mended.push_str("null");
                    at += word.len();
                    kept = at;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    (kept > 0).then(|| mended + text.get(kept..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_outside_of_strings_become_null() {
        for (text, expected) in [
            (r#"{"a":NaN}"#, Some(r#"{"a":null}"#)),
            (r#"{"a":[-Infinity,Infinity,1]}"#, Some(r#"{"a":[null,null,1]}"#)),
            (r#"{"a":"NaN"}"#, None),
            (r#"{"a\"NaN":"\\","b":NaN}"#, Some(r#"{"a\"NaN":"\\","b":null}"#)),
            ("NaN", Some("null")),
            ("\"\\", None),
            ("é-N", None),
            ("", None),
        ] {
            assert_eq!(as_null(text).as_deref(), expected, "{text}");
        }
    }
}
