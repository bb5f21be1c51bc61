//! RFC 3339 timestamps to microseconds, in the one pass the hot path can afford; what else devices send in the files below.
//!
//! Any fraction length (digits beyond microseconds are cut off, so that a reading's identity is what the column can
//! hold), `Z` or an offset, or neither. No allocation, no panic on any bytes.

mod epoch;
mod iso_8601;

use jiff::tz::TimeZone;

pub use epoch::parse as parse_epoch;
pub use iso_8601::parse as parse_iso_8601;

const MICROS_PER_SECOND: i64 = 1_000_000;

/// Microseconds between 1970-01-01 and 2000-01-01, the epoch of Postgres' binary timestamps.
pub const POSTGRES_EPOCH_US: i64 = 946_684_800 * MICROS_PER_SECOND;

/// A time as its text says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed {
    /// Microseconds since 1970; as if it were UTC when there is no zone.
    us: i64,
    /// `Z` or an offset was given.
    pub has_zone: bool,
    /// The seconds were 60. `us` is in the minute after.
    leap: bool,
}

impl Parsed {
    /// Microseconds since 1970, UTC when there is no zone. `None` for second 60 where there cannot be one: leap seconds are
    /// at the end of June and December.
    #[must_use]
    pub fn utc(self) -> Option<i64> {
        (!self.leap || ends_leap_second(self.us)).then_some(self.us)
    }

    /// As local time in a zone, when there is no other. `None` when the zone's clocks skip that time or show it twice.
    #[must_use]
    pub fn in_zone(self, zone: &TimeZone) -> Option<i64> {
        if self.has_zone {
            return self.utc();
        }
        let civil = jiff::Timestamp::from_microsecond(self.us).ok()?.to_zoned(TimeZone::UTC).datetime();
        let us = zone.to_ambiguous_timestamp(civil).unambiguous().ok()?.as_microsecond();
        Self { us, has_zone: true, ..self }.utc()
    }
}

/// Parses an RFC 3339 timestamp into microseconds since 1970-01-01T00:00:00Z; UTC when it has no zone.
#[must_use]
pub fn parse(text: &[u8]) -> Option<i64> {
    parse_rfc_3339(text)?.utc()
}

/// Parses an RFC 3339 timestamp, with or without a zone.
#[must_use]
pub fn parse_rfc_3339(text: &[u8]) -> Option<Parsed> {
    let (date, rest) = text.split_first_chunk::<10>()?;
    let &[y1, y2, y3, y4, b'-', m1, m2, b'-', d1, d2] = date else { return None };
    let year = i64::from(two(y1, y2)?) * 100 + i64::from(two(y3, y4)?);
    let month = two(m1, m2)?;
    let day = two(d1, d2)?;
    let (time, rest) = rest.split_first_chunk::<9>()?;
    let &[b'T' | b't' | b' ', h1, h2, b':', i1, i2, b':', s1, s2] = time else { return None };
    let (hour, minute, second) = (two(h1, h2)?, two(i1, i2)?, two(s1, s2)?);
    if hour > 23 {
        return None;
    }
    let (fraction, rest) = fraction(rest, b".")?;
    parsed((year, month, day), (hour, minute, second), fraction, offset_seconds(rest)?)
}

/// Puts the parts together; `hour` may be 24. `offset` in seconds.
fn parsed(
    (year, month, day): (i64, u32, u32),
    (hour, minute, second): (u32, u32, u32),
    fraction_us: i64,
    offset: Option<i64>,
) -> Option<Parsed> {
    // 60 is a leap second, which Postgres too counts as the first second of the next minute.
    if !(1..=12).contains(&month) || day < 1 || day > days_in(year, month) || minute > 59 || second > 60 {
        return None;
    }
    let seconds = days_from_civil(year, month, day) * 86_400
        + i64::from(hour) * 3600
        + i64::from(minute) * 60
        + i64::from(second)
        - offset.unwrap_or(0);
    let us = seconds * MICROS_PER_SECOND + fraction_us;
    Some(Parsed { us, has_zone: offset.is_some(), leap: second == 60 })
}

/// Whether a leap second can have ended in this second: at midnight UTC before a first of January or July.
fn ends_leap_second(us: i64) -> bool {
    let Ok(time) = jiff::Timestamp::from_microsecond(us) else { return false };
    let time = time.to_zoned(TimeZone::UTC);
    (time.hour(), time.minute(), time.second(), time.day()) == (0, 0, 0, 1) && matches!(time.month(), 1 | 7)
}

fn digit(byte: u8) -> Option<u32> {
    byte.is_ascii_digit().then(|| u32::from(byte - b'0'))
}

fn two(tens: u8, ones: u8) -> Option<u32> {
    Some(digit(tens)? * 10 + digit(ones)?)
}

/// A fraction of a second after one of `points`, in microseconds, and what follows.
fn fraction<'a>(rest: &'a [u8], points: &[u8]) -> Option<(i64, &'a [u8])> {
    let Some((_, digits)) = rest.split_first().filter(|(first, _)| points.contains(first)) else {
        return Some((0, rest));
    };
    let length = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if length == 0 {
        return None;
    }
    let (digits, rest) = digits.split_at_checked(length)?;
    let micros = digits
        .iter()
        .chain(std::iter::repeat(&b'0'))
        .take(6)
        .fold(0, |sum, byte| sum * 10 + i64::from(byte - b'0'));
    Some((micros, rest))
}

/// `Some(None)`: no offset.
fn offset_seconds(rest: &[u8]) -> Option<Option<i64>> {
    match rest {
        [] => Some(None),
        [b'Z' | b'z'] => Some(Some(0)),
        &[sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => offset(sign, two(h1, h2)?, two(m1, m2)?).map(Some),
        _ => None,
    }
}

fn offset(sign: u8, hours: u32, minutes: u32) -> Option<i64> {
    if hours > 23 || minutes > 59 {
        return None;
    }
    let seconds = i64::from(hours * 3600 + minutes * 60);
    Some(if sign == b'-' { -seconds } else { seconds })
}

fn days_in(year: i64, month: u32) -> u32 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Days since 1970-01-01 in the proleptic Gregorian calendar. Years are counted from March, so that the leap day
/// is the last of its year and month lengths follow one formula.
fn days_from_civil(year: i64, month: u32, day: u32) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let month_from_march = i64::from((month + 9) % 12);
    let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(day) - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, expected: Option<i64>) {
        assert_eq!(parse(text.as_bytes()), expected, "{text}");
    }

    #[test]
    fn reads_what_clients_send() {
        let whole = 1_770_091_506_000_000;
        check("2026-02-03T04:05:06Z", Some(whole));
        check("2026-02-03T04:05:06", Some(whole));
        check("2026-02-03t04:05:06z", Some(whole));
        check("2026-02-03 04:05:06Z", Some(whole));
        check("2026-02-03T04:05:06.789Z", Some(whole + 789_000));
        check("2026-02-03T04:05:06.1Z", Some(whole + 100_000));
        check("2026-02-03T04:05:06.123456789Z", Some(whole + 123_456));
        check("2026-02-03T06:05:06.5+02:00", Some(whole + 500_000));
        check("2026-02-02T22:35:06-05:30", Some(whole));
        check("1969-12-31T23:59:59.999999Z", Some(-1));
        check("2000-01-01T00:00:00Z", Some(POSTGRES_EPOCH_US));
        check("2024-02-29T00:00:00Z", Some(1_709_164_800_000_000));
        check("2016-12-31T23:59:60Z", Some(1_483_228_800_000_000));
        check("2015-06-30T23:59:60.25Z", Some(1_435_708_800_250_000));
        check("2017-01-01T05:29:60+05:30", Some(1_483_228_800_000_000));
    }

    #[test]
    fn second_60_is_taken_only_where_a_leap_second_can_be() {
        for text in [
            "2026-02-03T04:05:60Z",
            "2016-12-31T23:58:60Z",
            "2016-12-30T23:59:60Z",
            "2016-12-31T23:59:60+01:00",
            "2016-03-31T23:59:60Z",
            "2026-02-03T04:05:60",
        ] {
            check(text, None);
        }
    }

    #[test]
    fn a_time_without_a_zone_is_local_in_a_zone_that_is_given() {
        let denver = TimeZone::get("America/Denver").unwrap();
        for (text, expected) in [
            ("2026-02-03T04:05:06", Some("2026-02-03T11:05:06Z")),
            ("2026-07-03T04:05:06.5", Some("2026-07-03T10:05:06.5Z")),
            ("2026-02-03T04:05:06Z", Some("2026-02-03T04:05:06Z")),
            ("2026-02-03T04:05:06+01:00", Some("2026-02-03T03:05:06Z")),
            // The clocks go forward and back.
            ("2026-03-08T02:30:00", None),
            ("2026-11-01T01:30:00", None),
            ("2016-12-31T16:59:60", Some("2017-01-01T00:00:00Z")),
            ("2016-12-31T23:59:60", None),
        ] {
            let expected = expected.map(|utc| parse(utc.as_bytes()).unwrap());
            assert_eq!(parse_rfc_3339(text.as_bytes()).unwrap().in_zone(&denver), expected, "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "",
            "2026-02-03",
            "2026-02-03T04:05",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-01-00T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:60:00Z",
            "2026-01-01T00:00:61Z",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00+0200",
            "2026-01-01T00:00:00+24:00",
            "2026-01-01T00:00:00ZZ",
            "1770091506",
            "2026-02-03T04:05:0６Z",
        ] {
            check(text, None);
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(us) = parse(&bytes) {
                prop_assert!(us.abs() < 300_000_000_000 * MICROS_PER_SECOND);
            }
        }

        #[test]
        fn agrees_with_jiff(us in -62_135_596_800_000_000_i64..253_402_300_799_000_000) {
            let text = jiff::Timestamp::from_microsecond(us).unwrap().to_string();
            prop_assert_eq!(parse(text.as_bytes()), Some(us), "{}", text);
        }
    }
}
