//! Arrays that are not JSON as a whole.

use super::*;

fn at(second: u32) -> String {
    GOOD.replace("04:05:06.789", &format!("04:05:{second:02}"))
}

/// Seconds of the readings that are kept, and the parts that are refused.
fn check(payload: &[u8], kept: &[i64], refused: &[&[u8]]) {
    let seen = seen(TOPIC, payload);
    let shown = String::from_utf8_lossy(payload);
    let seconds: Vec<i64> =
        seen.readings.iter().map(|reading| reading.timestamp_us / 1_000_000 % 60).collect();
    assert_eq!(seconds, kept, "{shown}: {:?}", seen.rejected);
    let parts: Vec<&[u8]> = seen.rejected.iter().map(|(part, _)| *part).collect();
    assert_eq!(parts, refused, "{shown}");
    for reading in &seen.readings {
        let element = element_at(payload, reading.element);
        let second = format!("04:05:{:02}", reading.timestamp_us / 1_000_000 % 60);
        assert!(
            std::str::from_utf8(element).unwrap().contains(&second),
            "{shown}: element {}",
            reading.element
        );
    }
}

#[test]
fn good_elements_of_a_broken_array_are_kept() {
    let [a, b, c] = [1, 2, 3].map(at);
    let nan = b.replace("3412", "NaN");
    let cut = b.split_at(100).0;
    let missing_quote = b.replacen("\"turbine\"", "\"turbine", 1);
    for (bad, parts) in [
        (nan.as_str(), vec![nan.as_str()]),
        (cut, vec![cut]),
        ("garbage", vec!["garbage"]),
        ("17", vec!["17"]),
        ("tru", vec!["tru"]),
        ("", vec![""]),
        ("\"x\"", vec!["\"x\""]),
        ("{", vec!["{"]),
        ("}", vec!["}"]),
        ("{}", vec!["{}"]),
        ("{'device_id':1}", vec!["{'device_id':1}"]),
        ("// a comment", vec!["// a comment"]),
        (missing_quote.as_str(), vec![missing_quote.as_str()]),
    ] {
        let payload = format!("[{a},{bad},{c}]");
        let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
        check(payload.as_bytes(), &[1, 3], &parts);
    }
}

#[test]
fn a_byte_that_is_not_utf_8_costs_its_element() {
    let [a, b, c] = [1, 2, 3].map(at);
    let bad: Vec<u8> =
        b.replace("Nominal", "21?C").bytes().map(|byte| if byte == b'?' { 0xb0 } else { byte }).collect();
    let payload = [b"[", a.as_bytes(), b",", &bad, b",", c.as_bytes(), b"]"].concat();
    check(&payload, &[1, 3], &[&bad]);
    let error = seen(TOPIC, &payload).rejected.remove(0).1.error;
    assert!(error.starts_with("element 1: not UTF-8: byte 0xb0 at offset"), "{error}");
}

#[test]
fn commas_and_ends() {
    let [a, b] = [1, 2].map(at);
    check(format!("[{a},{b},]").as_bytes(), &[1, 2], &[]);
    check(format!("[{a} {b}]").as_bytes(), &[1, 2], &[]);
    check(format!("[{a},,{b}]").as_bytes(), &[1, 2], &[b""]);
    check(format!("[{a},{b}] x").as_bytes(), &[1, 2], &[b"x"]);
    check(format!("[{a},{b}]]").as_bytes(), &[1, 2], &[b"]"]);
    check(format!("[{a},{b}").as_bytes(), &[1, 2], &[b""]);
    check(format!("[{a},").as_bytes(), &[1], &[b""]);
    // An array in the array, which then is not closed.
    check(format!("[{a},[,{b}]").as_bytes(), &[1], &[format!("[,{b}]").as_bytes(), b""]);
    check(format!("\n [{a}, {}", b.split_at(50).0).as_bytes(), &[1], &[b.split_at(50).0.as_bytes()]);
}

#[test]
fn every_cut_keeps_what_is_whole() {
    let [a, b] = [1, 2].map(at);
    let payload = format!("[{a},{b}]");
    for length in 1..payload.len() {
        let cut = &payload.as_bytes()[..length];
        let seen = seen(TOPIC, cut);
        let whole = usize::from(length > a.len()) + usize::from(length > a.len() + b.len() + 1);
        assert_eq!((seen.readings.len(), seen.rejected.len()), (whole, 1), "{length}");
    }
}

#[test]
fn elements_of_one_time_are_told_apart() {
    let [a, b] = [GOOD.to_owned(), GOOD.replace("3412", "3413")];
    for payload in [format!("[{a},{b}]"), format!("[{a},x,{b}]"), format!(" [ {a} , 17 , {b} ] ")] {
        let seen = seen(TOPIC, payload.as_bytes());
        assert_eq!(seen.readings.len(), 2);
        for (reading, text) in seen.readings.iter().zip([&a, &b]) {
            assert_eq!(element_at(payload.as_bytes(), reading.element), text.as_bytes());
        }
    }
    assert_eq!(element_at(GOOD.as_bytes(), 0), GOOD.as_bytes());
    assert_eq!(element_at(b"[1]", 7), b"[1]", "the whole message when there is no such element");
}

#[test]
fn attacks_on_the_splitter_end() {
    for payload in [
        "[".repeat(10_000),
        "[".repeat(200_000),
        format!("[{}", "{\"a\":".repeat(40_000)),
        format!("[\"{}", "x".repeat(200_000)),
        format!("[{}", "{\",{\"".repeat(40_000)),
        format!("[{}", "{},".repeat(80_000)),
        format!("[{GOOD},{}", "\\\"".repeat(80_000)),
    ] {
        let seen = seen(TOPIC, payload.as_bytes());
        assert!(!seen.rejected.is_empty());
        let refused: usize = seen.rejected.iter().map(|(part, _)| part.len()).sum();
        assert!(refused <= payload.len());
    }
}

proptest! {
    /// A good element among anything is kept when the rest is balanced, whatever is around it.
    #[test]
    fn neighbours_of_garbage_are_kept(garbage in "[a-z0-9 .:+-]{0,40}", before in any::<bool>()) {
        let good = at(1);
        let payload = if before { format!("[{garbage},{good}]") } else { format!("[{good},{garbage}]") };
        prop_assert_eq!(seen(TOPIC, payload.as_bytes()).readings.len(), 1);
    }

    #[test]
    fn one_damaged_byte_costs_at_most_its_element(place in 0..GOOD.len(), byte in any::<u8>()) {
        let [a, b, c] = [1, 2, 3].map(at);
        let mut payload = format!("[{a},{b},{c}]").into_bytes();
        let middle = a.len() + 2 + place % b.len();
        let replaced = std::mem::replace(&mut payload[middle], byte);
        let seen = seen(TOPIC, &payload);
        let seconds: Vec<i64> = seen.readings.iter().map(|reading| reading.timestamp_us / 1_000_000 % 60).collect();
        let shown = String::from_utf8_lossy(&payload).into_owned();
        prop_assert!(seconds.contains(&1), "{}", shown);
        // With a bracket more or less the third may look like a part of the second, or like what follows the array.
        let structure = b"[]{}";
        let kept = seconds.contains(&3) || structure.contains(&byte) || structure.contains(&replaced);
        prop_assert!(kept, "{}", shown);
    }
}
