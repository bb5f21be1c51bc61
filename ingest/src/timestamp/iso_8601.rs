//! ISO 8601 beyond RFC 3339, as far as it is unambiguous: dates and times without separators, no seconds, a comma before the
//! fraction, offsets without a colon or without minutes, 24:00, `UTC` and `GMT`.

use super::{Parsed, fraction, offset, parsed, two};

/// Parses a date and a time. `None` when it is neither in this nor in RFC 3339's form.
#[must_use]
pub fn parse(text: &[u8]) -> Option<Parsed> {
    let (date, rest) = date(text)?;
    let rest = rest.strip_prefix(b"T").or(rest.strip_prefix(b"t")).or(rest.strip_prefix(b" "))?;
    let (time, rest) = time(rest)?;
    let (fraction, rest) = match time.2 {
        Some(_) => fraction(rest, b".,")?,
        None => (0, rest),
    };
    let (hour, minute, second) = (time.0, time.1, time.2.unwrap_or(0));
    // The end of a day.
    if hour > 24 || (hour == 24 && (minute, second, fraction) != (0, 0, 0)) {
        return None;
    }
    parsed(date, (hour, minute, second), fraction, zone(rest)?)
}

/// Year, month, day.
type Date = (i64, u32, u32);
/// Hour, minute, and the second if there is one.
type Time = (u32, u32, Option<u32>);

fn date(text: &[u8]) -> Option<(Date, &[u8])> {
    let (&[y1, y2, y3, y4], rest) = text.split_first_chunk::<4>()?;
    let year = i64::from(two(y1, y2)?) * 100 + i64::from(two(y3, y4)?);
    match *rest {
        [b'-', m1, m2, b'-', d1, d2, ref rest @ ..] => Some(((year, two(m1, m2)?, two(d1, d2)?), rest)),
        [m1, m2, d1, d2, ref rest @ ..] => Some(((year, two(m1, m2)?, two(d1, d2)?), rest)),
        _ => None,
    }
}

fn time(text: &[u8]) -> Option<(Time, &[u8])> {
    let (&[h1, h2], rest) = text.split_first_chunk::<2>()?;
    let hour = two(h1, h2)?;
    let (colon, rest) = match rest.strip_prefix(b":") {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let (&[m1, m2], rest) = rest.split_first_chunk::<2>()?;
    let minute = two(m1, m2)?;
    match *rest {
        [b':', s1, s2, ref rest @ ..] if colon => Some(((hour, minute, Some(two(s1, s2)?)), rest)),
        [s1 @ b'0'..=b'9', s2, ref rest @ ..] if !colon => Some(((hour, minute, Some(two(s1, s2)?)), rest)),
        _ => Some(((hour, minute, None), rest)),
    }
}

/// `Some(None)`: no zone.
fn zone(text: &[u8]) -> Option<Option<i64>> {
    match *text.strip_prefix(b" ").unwrap_or(text) {
        [] if text.is_empty() => Some(None),
        [b'Z' | b'z'] | [b'U', b'T', b'C'] | [b'G', b'M', b'T'] => Some(Some(0)),
        [sign @ (b'+' | b'-'), h1, h2] => offset(sign, two(h1, h2)?, 0).map(Some),
        [sign @ (b'+' | b'-'), h1, h2, m1, m2] | [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            offset(sign, two(h1, h2)?, two(m1, m2)?).map(Some)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::timestamp;

    #[test]
    fn reads_what_is_unambiguous_and_refuses_the_rest() {
        let whole = 1_770_091_506_000_000;
        for (text, expected) in [
            ("2026-02-03T05:05:06+0100", Some(whole)),
            ("2026-02-03T05:05:06+01", Some(whole)),
            ("2026-02-02T22:35:06-0530", Some(whole)),
            ("2026-02-03 04:05:06 UTC", Some(whole)),
            ("2026-02-03 05:05:06 +0100", Some(whole)),
            ("2026-02-03T04:05:06,789Z", Some(whole + 789_000)),
            ("2026-02-03T04:05Z", Some(whole - 6_000_000)),
            ("2026-02-03T04:05", Some(whole - 6_000_000)),
            ("20260203T040506Z", Some(whole)),
            ("20260203T040506.5+0000", Some(whole + 500_000)),
            ("20260203T0405Z", Some(whole - 6_000_000)),
            ("2026-02-03T040506Z", Some(whole)),
            ("2026-02-02T24:00:00Z", Some(whole - 14_706_000_000)),
            ("2026-02-02T24:00Z", Some(whole - 14_706_000_000)),
            ("2026-02-02T24:00:01Z", None),
            ("2026-02-02T25:00Z", None),
            ("2026-02-03T04:0506Z", None),
            ("2026-02-03T04Z", None),
            ("2026-02-03T04:05.5Z", None),
            ("2026-02-03T04:05:06 ", None),
            ("2026-02-03T04:05:06+1", None),
            ("2026-02-03T04:05:06 CET", None),
            ("2026-W06-2T04:05:06Z", None),
            ("2026-034T04:05:06Z", None),
            ("20260203040506", None),
            ("2026-02-03", None),
            ("03.02.2026 04:05:06", None),
            ("2026-2-3T4:5:6Z", None),
            ("20260230T040506Z", None),
            ("", None),
        ] {
            assert_eq!(parse(text.as_bytes()).and_then(Parsed::utc), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..40), text in "[0-9:TZ+,. -]{0,30}") {
            for bytes in [bytes.as_slice(), text.as_bytes()] {
                prop_assert!(parse(bytes).and_then(Parsed::utc).is_none_or(|us| us.abs() < 300_000_000_000_000_000));
            }
        }

        /// What the hot path takes means the same here.
        #[test]
        fn agrees_with_rfc_3339(us in -62_135_596_800_000_000_i64..253_402_300_799_000_000) {
            let text = jiff::Timestamp::from_microsecond(us).unwrap().to_string();
            prop_assert_eq!(parse(text.as_bytes()), timestamp::parse_rfc_3339(text.as_bytes()));
        }
    }
}
