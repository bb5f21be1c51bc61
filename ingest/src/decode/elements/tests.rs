//! Cutting arrays, good and broken.

use proptest::prelude::*;
use serde_json::value::RawValue;

use super::*;

/// Elements in words; `+` before what follows the array, `!` when it is not closed.
fn pieces(text: &str) -> Vec<String> {
    Elements::of(text.as_bytes())
        .unwrap()
        .map(|piece| match piece {
            Piece::Element { text, .. } => String::from_utf8_lossy(text).into_owned(),
            Piece::After(text) => format!("+{}", String::from_utf8_lossy(text)),
            Piece::Unclosed(_) => "!".into(),
        })
        .collect()
}

fn check(text: &str, expected: &[&str]) {
    assert_eq!(pieces(text), expected, "{text}");
}

#[test]
fn elements_of_good_arrays() {
    check("[]", &[]);
    check(" [ ] ", &[]);
    check("[1]", &["1"]);
    check(
        "[ {\"a\":[1,{\"b\":2},3]} , [] ,\"x,]\\\"\", null ]",
        &["{\"a\":[1,{\"b\":2},3]}", "[]", "\"x,]\\\"\"", "null"],
    );
    check("[{\"m\":\"expected, {\"},{\"b\":1}]", &["{\"m\":\"expected, {\"}", "{\"b\":1}"]);
    check("[{\"v\":[{\"a\":1}, {\"b\":2}]}]", &["{\"v\":[{\"a\":1}, {\"b\":2}]}"]);
}

#[test]
fn elements_of_broken_arrays() {
    check("[{\"a\":1},{\"v\":NaN},{\"b\":2}]", &["{\"a\":1}", "{\"v\":NaN}", "{\"b\":2}"]);
    check("[{\"a\":1},]", &["{\"a\":1}"]);
    check("[1,,2]", &["1", "", "2"]);
    check("[,]", &[""]);
    check("[{\"a\":1} {\"b\":2}]", &["{\"a\":1}", "{\"b\":2}"]);
    check("[{\"a\":1}x,{\"b\":2}]", &["{\"a\":1}", "x", "{\"b\":2}"]);
    check("[{\"a\":1}}, {\"b\":2}]", &["{\"a\":1}", "}", "{\"b\":2}"]);
    check("[garbage, more {\"b\":2}]", &["garbage", "more", "{\"b\":2}"]);
    check("[{\"a\":1}, {\"b\":", &["{\"a\":1}", "{\"b\":"]);
    check("[{\"a\":1}, \"x", &["{\"a\":1}", "\"x"]);
    check("[{\"a\":1}, nul", &["{\"a\":1}", "nul"]);
    check("[{\"a\":1},", &["{\"a\":1}", "!"]);
    check("[{\"a\":1}", &["{\"a\":1}", "!"]);
    check("[", &["!"]);
    check("[1] [2]", &["1", "+[2]"]);
    check("[1]]", &["1", "+]"]);
}

#[test]
fn an_element_without_its_end_costs_only_itself() {
    let (first, third) =
        ("{\"device_id\":\"T\",\"metrics\":{\"rpm\":1}}", "{\"device_id\":\"T\",\"metrics\":{\"rpm\":3}}");
    let second = "{\"device_id\":\"T\",\"metrics\":{\"rpm\":2},\"tags\":{\"t\":\"x\"}}";
    for length in 1..second.len() {
        let cut = &second[..length];
        for gap in [",", ", ", " ,\n "] {
            let array = format!("[{first}{gap}{cut}{gap}{third}]");
            assert_eq!(pieces(&array), [first, cut, third], "{array}");
        }
    }
}

#[test]
fn hostile_arrays_are_cut_in_linear_time() {
    for unit in [
        "[",
        "{\"",
        "[{\",{\"",
        ",{\"",
        "{\"1, {\"1\",{\"",
        "{\"a\":1, {\"",
        "]",
        "\"",
        "\\",
        "{}x",
        " ",
        "{\"a\":1,",
        "{, ",
    ] {
        for count in [1_000, 10_000] {
            let text = format!("[{}", unit.repeat(count));
            let mut elements = Elements::of(text.as_bytes()).unwrap();
            let pieces = elements.by_ref().count();
            assert!(pieces <= text.len() + 1, "{unit}");
            assert!(elements.scanned <= (1 + RESCANS) * text.len(), "{unit}: {}", elements.scanned);
        }
    }
}

/// Elements by serde_json, when it is an array.
fn by_serde(text: &str) -> Option<Vec<&str>> {
    let elements: Vec<&RawValue> = serde_json::from_str(text).ok()?;
    Some(elements.into_iter().map(RawValue::get).collect())
}

proptest! {
    #[test]
    fn the_elements_of_json_are_those_of_serde_json(
        text in r#"\[[\[\]{}:,"\\0-9trul \n]{0,30}\]"#,
        values in prop::collection::vec(any_json(), 0..6),
    ) {
        for text in [text, serde_json::Value::from(values.clone()).to_string(), serde_json::to_string_pretty(&values).unwrap()] {
            if let Some(expected) = by_serde(&text) {
                prop_assert_eq!(pieces(&text), expected);
            }
        }
    }

    /// Every byte that is neither a comma, a bracket nor white space is in exactly one piece.
    #[test]
    fn nothing_is_lost(text in r#"\[[\[\]{}:,"\\0-9truxl \n]{0,60}"#) {
        let count = |text: &str| text.bytes().filter(|byte| !b",[] \n".contains(byte)).count();
        let found: usize = pieces(&text).iter().map(|piece| count(piece.trim_start_matches(['+', '!']))).sum();
        prop_assert_eq!(found, count(&text), "{:?}", pieces(&text));
    }
}

fn any_json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i32>().prop_map(Value::from),
        "[a-z,{}\\[\\]\"\\\\ ]{0,8}".prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 20, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z, {]{0,4}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect()))
        ]
    })
}
