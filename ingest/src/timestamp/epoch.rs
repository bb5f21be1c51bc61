//! Counts of seconds, milliseconds, microseconds or nanoseconds since 1970, with or without a fraction.
//!
//! The unit follows from the magnitude: each covers the years 1973 to 5138 in a range of its own. Exact: never through a
//! floating-point number, which would lose microseconds.

/// Fraction digits that are kept; the rest is below a nanosecond.
const MAX_FRACTION: usize = 12;

/// Microseconds since 1970 of a decimal number, for instance `1770091506.789` or `1.770091506789e9`. `None` when it is none,
/// or too small to be a time (before March 1973 in seconds): the time since a device was switched on, perhaps.
#[must_use]
pub fn parse(text: &[u8]) -> Option<i64> {
    let (mantissa, exponent) = match text.iter().position(|byte| matches!(byte, b'e' | b'E')) {
        Some(at) => (text.get(..at)?, exponent(text.get(at + 1..)?)?),
        None => (text, 0),
    };
    let (whole, fraction) = match mantissa.iter().position(|byte| *byte == b'.') {
        Some(at) => (mantissa.get(..at)?, mantissa.get(at + 1..).filter(|fraction| !fraction.is_empty())?),
        None => (mantissa, &[][..]),
    };
    if whole.is_empty() || whole.len() > 20 || !whole.iter().chain(fraction).all(u8::is_ascii_digit) {
        return None;
    }
    // The number is digits * 10^scale; at most 20 + 12 digits.
    let kept = if exponent == 0 { MAX_FRACTION } else { MAX_FRACTION + 6 }.min(fraction.len());
    let digits = whole
        .iter()
        .chain(fraction.get(..kept)?)
        .fold(0_u128, |sum, digit| sum * 10 + u128::from(digit - b'0'));
    let scale = exponent - i32::try_from(kept).ok()?;
    let seconds = scaled(digits, scale)?;
    // From 10^8 s, 10^11 ms, 10^14 us, 10^17 ns on.
    let to_micros = match seconds {
        100_000_000..100_000_000_000 => 6,
        100_000_000_000..100_000_000_000_000 => 3,
        100_000_000_000_000..100_000_000_000_000_000 => 0,
        100_000_000_000_000_000..100_000_000_000_000_000_000 => -3,
        _ => return None,
    };
    i64::try_from(scaled(digits, scale + to_micros)?).ok()
}

/// `digits * 10^scale`, what is after the point cut off. `None` when it is too large.
fn scaled(digits: u128, scale: i32) -> Option<u128> {
    let power = 10_u128.checked_pow(scale.unsigned_abs());
    if scale >= 0 { digits.checked_mul(power?) } else { Some(power.map_or(0, |power| digits / power)) }
}

/// `9`, `+9` or `-3`; no more than two digits.
fn exponent(text: &[u8]) -> Option<i32> {
    let text = std::str::from_utf8(text).ok()?;
    let exponent: i32 = text.parse().ok()?;
    (exponent.abs() < 100).then_some(exponent)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_unit_follows_from_the_magnitude() {
        let time = 1_770_091_506_789_012;
        for (text, expected) in [
            ("1770091506", Some(1_770_091_506_000_000)),
            ("1770091506.789012", Some(time)),
            ("1770091506.7890129", Some(time)),
            ("1770091506.0", Some(1_770_091_506_000_000)),
            ("1770091506789", Some(1_770_091_506_789_000)),
            ("1770091506789.012", Some(time)),
            ("1770091506789012", Some(time)),
            ("1770091506789012345", Some(time)),
            ("1770091506789012.9", Some(time)),
            ("1.770091506789012e9", Some(time)),
            ("1.770091506789012E+15", Some(time)),
            ("177009150678901200e-2", Some(time)),
            ("100000000", Some(100_000_000_000_000)),
            ("99999999", None),
            ("99999999.9", None),
            ("0", None),
            ("-1770091506", None),
            ("1e400", None),
            ("1e99", None),
            ("1e-99", None),
            ("100000000000000000000", None),
            ("1770091506.", None),
            (".5", None),
            ("1770091506Z", None),
            ("0x6981", None),
            ("20260203", None),
            ("", None),
            ("e", None),
            ("1e", None),
        ] {
            assert_eq!(parse(text.as_bytes()), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..40), text in "[0-9]{0,60}(\\.[0-9]{0,60})?([eE][+-]?[0-9]{0,4})?") {
            for bytes in [bytes.as_slice(), text.as_bytes()] {
                prop_assert!(parse(bytes).is_none_or(|us| us >= 100_000_000_000_000));
            }
        }

        #[test]
        fn every_microsecond_of_a_century_is_exact_in_each_unit(us in 100_000_000_000_000_i64..4_000_000_000_000_000) {
            let text = |unit: i64, digits: usize| format!("{}.{:0digits$}", us / unit, us % unit);
            for text in [text(1_000_000, 6), text(1_000, 3), us.to_string(), (us * 1_000).to_string()] {
                prop_assert_eq!(parse(text.as_bytes()), Some(us), "{}", text);
            }
        }
    }
}
