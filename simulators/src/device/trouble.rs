//! Deliberate trouble: which message gets which flaw, how the flaw is made, and what must become of it.
//!
//! Drawn by seed, device and sequence, so a message that must be sent again gets the same flaw again. In an array one
//! reading carries the flaw (`NotJson` and `TooLarge` aside, which cost the whole message) and the rest are good.

use std::time::Duration;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::seeds::{join, mix};

/// A size that defaults well above what consumers are set to take.
pub(super) const OVERSIZE: ByteSize = ByteSize::mib(1);

/// Injected faults. Rates are fractions of all messages, from 0 to 1, together at most 1.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TroubleSettings {
    /// The payload is truncated, not JSON, or not UTF-8.
    pub not_json: f64,
    /// A required field has the wrong type.
    pub wrong_type: f64,
    /// A required field is missing.
    pub missing_field: f64,
    /// The payload names another device than the topic.
    pub topic_mismatch: f64,
    /// A NUL character in a string, which Postgres refuses in jsonb.
    pub nul_character: f64,
    /// A number beyond the range of jsonb: valid JSON that only the database can refuse.
    pub huge_number: f64,
    /// A payload of `oversize`. Must be above what consumers accept and below the maximum packet size that
    /// they announce to the broker: the broker drops larger messages without notice.
    pub too_large: f64,
    /// A timestamp older than any retention.
    pub too_old: f64,
    /// A timestamp far ahead of the clock.
    pub far_future: f64,
    /// A valid reading that is `late_by` late; it must be stored.
    pub late: f64,
    /// A valid reading that is published again, unchanged, after `duplicate_after`.
    pub duplicate: f64,
    /// Size of a `too_large` payload.
    #[schemars(with = "String", extend("format" = "size"))]
    pub oversize: ByteSize,
    /// Age of a `too_old` reading.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub too_old_by: Duration,
    /// Distance of a `far_future` reading ahead of the clock.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub far_future_by: Duration,
    /// Delay of a `late` reading.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub late_by: Duration,
    /// Time after which a `duplicate` is published again.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub duplicate_after: Duration,
}

const DAY: Duration = Duration::from_secs(24 * 3600);

impl Default for TroubleSettings {
    fn default() -> Self {
        Self {
            not_json: 0.0,
            wrong_type: 0.0,
            missing_field: 0.0,
            topic_mismatch: 0.0,
            nul_character: 0.0,
            huge_number: 0.0,
            too_large: 0.0,
            too_old: 0.0,
            far_future: 0.0,
            late: 0.0,
            duplicate: 0.0,
            oversize: OVERSIZE,
            too_old_by: DAY * 30,
            far_future_by: DAY * 30,
            late_by: Duration::from_secs(600),
            duplicate_after: Duration::from_secs(1),
        }
    }
}

/// What is wrong with a message, if anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    NotJson,
    WrongType,
    MissingField,
    TopicMismatch,
    NulCharacter,
    HugeNumber,
    TooLarge,
    TooOld,
    FarFuture,
    Late,
    Duplicate,
}

/// Why a message ends as a dead letter: the contract's reasons.
pub const REASONS: [&str; 7] = [
    "not_json",
    "missing_field",
    "wrong_type",
    "topic_mismatch",
    "timestamp_out_of_range",
    "too_large",
    "rejected_by_database",
];

/// What a flaw is called in settings, ledger and summary, in the order of [`Flaw`].
pub const FLAWS: [&str; 11] = [
    "not_json",
    "wrong_type",
    "missing_field",
    "topic_mismatch",
    "nul_character",
    "huge_number",
    "too_large",
    "too_old",
    "far_future",
    "late",
    "duplicate",
];

impl Flaw {
    /// Place in [`FLAWS`].
    #[must_use]
    pub fn number(self) -> Option<usize> {
        (self as usize).checked_sub(1)
    }

    /// Place in [`REASONS`] of the one dead letter this flaw makes; `None`: all readings are good.
    #[must_use]
    pub fn dead_letter(self) -> Option<usize> {
        match self {
            Self::None | Self::Late | Self::Duplicate => None,
            Self::NotJson => Some(0),
            Self::MissingField => Some(1),
            Self::WrongType => Some(2),
            Self::TopicMismatch => Some(3),
            Self::TooOld | Self::FarFuture => Some(4),
            Self::TooLarge => Some(5),
            Self::NulCharacter | Self::HugeNumber => Some(6),
        }
    }

    /// Which of a message's `readings` are good.
    #[must_use]
    pub fn spares(self, reading: u16, readings: u16) -> bool {
        match self {
            Self::None | Self::Late | Self::Duplicate => true,
            Self::NotJson | Self::TooLarge => false,
            _ => reading != Self::place(readings),
        }
    }

    /// The reading of an array that carries the flaw.
    #[must_use]
    pub fn place(readings: u16) -> u16 {
        readings / 2
    }
}

impl TroubleSettings {
    fn rates(&self) -> [(&'static str, f64, Flaw); 11] {
        [
            ("not_json", self.not_json, Flaw::NotJson),
            ("wrong_type", self.wrong_type, Flaw::WrongType),
            ("missing_field", self.missing_field, Flaw::MissingField),
            ("topic_mismatch", self.topic_mismatch, Flaw::TopicMismatch),
            ("nul_character", self.nul_character, Flaw::NulCharacter),
            ("huge_number", self.huge_number, Flaw::HugeNumber),
            ("too_large", self.too_large, Flaw::TooLarge),
            ("too_old", self.too_old, Flaw::TooOld),
            ("far_future", self.far_future, Flaw::FarFuture),
            ("late", self.late, Flaw::Late),
            ("duplicate", self.duplicate, Flaw::Duplicate),
        ]
    }

    pub(super) fn check(&self) -> Result<(), (&'static str, &'static str)> {
        for (name, rate, _) in self.rates() {
            if !(0.0..=1.0).contains(&rate) {
                return Err((name, "must be 0 to 1"));
            }
        }
        if self.rates().iter().map(|(_, rate, _)| rate).sum::<f64>() > 1.0 {
            return Err(("*", "rates must not add up to more than 1"));
        }
        // MQTT's remaining length ends at 256 MB; nothing near that is a test.
        if self.oversize > ByteSize::mib(64) {
            return Err(("oversize", "must be at most 64MiB"));
        }
        for (name, time) in [
            ("too_old_by", self.too_old_by),
            ("far_future_by", self.far_future_by),
            ("late_by", self.late_by),
            ("duplicate_after", self.duplicate_after),
        ] {
            if time > DAY * 36_500 {
                return Err((name, "must be at most 100 years"));
            }
        }
        Ok(())
    }

    /// The draw's table: a message whose draw is below a bound gets that flaw.
    #[must_use]
    pub fn table(&self) -> Table {
        let mut sum = 0.0;
        let bounds = self.rates().into_iter().filter(|(_, rate, _)| *rate > 0.0).map(|(_, rate, flaw)| {
            sum += rate;
            (bound(sum), flaw)
        });
        Table { bounds: bounds.collect() }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0..=1 becomes 0..=u64::MAX")]
#[allow(clippy::cast_precision_loss, reason = "a rate needs no 64 bits")]
fn bound(rate: f64) -> u64 {
    (rate.min(1.0) * u64::MAX as f64) as u64
}

/// Cumulated rates, ready to draw from. Empty when there is no trouble.
#[derive(Debug, Clone)]
pub struct Table {
    bounds: Vec<(u64, Flaw)>,
}

impl Table {
    /// The flaw of this message of this device.
    #[must_use]
    pub fn draw(&self, seed: u64, device: u32, sequence: u64) -> Flaw {
        if self.bounds.is_empty() {
            return Flaw::None;
        }
        let drawn = join(join(seed ^ 0x7f1a, device.into()), sequence);
        self.bounds.iter().find(|(bound, _)| drawn <= *bound).map_or(Flaw::None, |(_, flaw)| *flaw)
    }
}

/// Spoils the good JSON object that starts at `from`. `variant` chooses among the ways to do it.
pub fn spoil(out: &mut Vec<u8>, from: usize, flaw: Flaw, variant: u64) {
    let text = String::from_utf8_lossy(out.get(from..).unwrap_or_default()).into_owned();
    let spoilt = match flaw {
        Flaw::WrongType => match variant % 3 {
            0 => replace_value(&text, "device_type", '"', "[17]"),
            1 => replace_value(&text, "timestamp_utc", '"', "true"),
            _ => replace_value(&text, "metrics", '}', "\"n/a\""),
        },
        Flaw::MissingField => {
            let field = match variant % 5 {
                0 => "device_id",
                1 => "device_type",
                2 => "site_id",
                3 => "timestamp_utc",
                _ => "metrics",
            };
            // Under another name it is an unknown field, which consumers ignore.
            text.replacen(&format!("\"{field}\":"), &format!("\"x_{field}\":"), 1)
        }
        Flaw::TopicMismatch => text.replacen("\",\"device_type\":", "-X\",\"device_type\":", 1),
        Flaw::NulCharacter if variant.is_multiple_of(2) => {
            text.replacen("\"vendor\":\"", "\"vendor\":\"\\u0000", 1)
        }
        Flaw::HugeNumber => text.replacen("\"metrics\":{", "\"metrics\":{\"overflow\":1e999999,", 1),
        Flaw::NulCharacter => text.replacen("\"message\":\"", "\"message\":\"NUL \\u0000 here: ", 1),
        _ => return,
    };
    out.truncate(from);
    out.extend_from_slice(spoilt.as_bytes());
}

/// Spoils a whole message (an object or an array) that starts at `from`.
pub fn spoil_message(out: &mut Vec<u8>, from: usize, flaw: Flaw, variant: u64, oversize: ByteSize) {
    let length = out.len() - from;
    match (flaw, variant % 3) {
        // Within the first reading: of an array, consumers keep the readings that are whole.
        (Flaw::NotJson, 0) => out.truncate(from + length.min(150) * 3 / 5),
        (Flaw::NotJson, 1) => {
            out.truncate(from);
            out.extend_from_slice(b"sensor rebooted; no reading");
        }
        (Flaw::NotJson, _) => {
            out.truncate(from);
            out.extend_from_slice(b"{\"device_id\":\"\xff\xfe\x00\x80\"");
        }
        (Flaw::TooLarge, _) => {
            // White space before the end keeps it good JSON: only its size is wrong.
            let size = usize::try_from(oversize.as_u64()).unwrap_or(usize::MAX);
            let end = out.pop();
            out.resize(from + size.saturating_sub(1).max(length - 1), b' ');
            out.extend(end);
        }
        _ => {}
    }
}

/// Puts `value` in the place of what stands at `"field":` up to and including `end`.
fn replace_value(text: &str, field: &str, end: char, value: &str) -> String {
    let key = format!("\"{field}\":");
    let Some((head, tail)) = text.split_once(&key) else { return text.to_owned() };
    let mut characters = tail.char_indices().skip(1);
    let rest =
        characters.find(|(_, c)| *c == end).map_or("", |(at, c)| tail.get(at + c.len_utf8()..).unwrap_or(""));
    format!("{head}{key}{value}{rest}")
}

/// Bits that choose the variant of a flaw.
#[must_use]
pub fn variant(device: u32, sequence: u64) -> u64 {
    mix(join(u64::from(device) ^ 0x0afe, sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flaw_has_its_name() {
        for (name, _, flaw) in TroubleSettings::default().rates() {
            assert_eq!(flaw.number().map(|number| FLAWS[number]), Some(name));
        }
        assert_eq!(Flaw::None.number(), None);
    }
    use crate::device::payload::Writer;
    use serde_json::Value;
    use wire::fleet::Device;

    const AT: i64 = 1_770_091_506_789_012;

    fn good() -> Vec<u8> {
        let mut out = b"head".to_vec();
        Writer::new(1).reading(&mut out, &Device::new(8), 5, AT);
        out
    }

    fn spoilt(flaw: Flaw, variant: u64) -> Value {
        let mut out = good();
        spoil(&mut out, 4, flaw, variant);
        assert!(out.starts_with(b"head"));
        serde_json::from_slice(&out[4..]).unwrap()
    }

    #[test]
    fn each_flaw_is_what_its_name_says() {
        let sound: Value = serde_json::from_slice(&good()[4..]).unwrap();
        assert!(spoilt(Flaw::WrongType, 0)["device_type"].is_array());
        assert!(spoilt(Flaw::WrongType, 1)["timestamp_utc"].is_boolean());
        assert!(spoilt(Flaw::WrongType, 2)["metrics"].is_string());
        for (variant, field) in
            ["device_id", "device_type", "site_id", "timestamp_utc", "metrics"].into_iter().enumerate()
        {
            let spoilt = spoilt(Flaw::MissingField, variant as u64);
            assert!(spoilt.get(field).is_none());
            assert_eq!(spoilt[format!("x_{field}")], sound[field]);
        }
        assert_eq!(spoilt(Flaw::TopicMismatch, 0)["device_id"], "TURB-00002-X");
        assert!(spoilt(Flaw::NulCharacter, 0)["tags"]["vendor"].as_str().unwrap().contains('\0'));
        assert!(spoilt(Flaw::NulCharacter, 1)["status"]["message"].as_str().unwrap().contains('\0'));
        for flaw in [Flaw::None, Flaw::Late, Flaw::Duplicate, Flaw::TooOld, Flaw::FarFuture] {
            assert_eq!(spoilt(flaw, 0), sound);
        }
    }

    #[test]
    fn a_spoilt_message_is_not_json_or_too_large() {
        for variant in 0..3 {
            let mut out = good();
            spoil_message(&mut out, 4, Flaw::NotJson, variant, OVERSIZE);
            assert!(serde_json::from_slice::<Value>(&out[4..]).is_err());
            let mut out = good();
            spoil_message(&mut out, 4, Flaw::TooLarge, variant, OVERSIZE);
            assert_eq!(out.len() - 4, 1 << 20);
            serde_json::from_slice::<Value>(&out[4..]).unwrap();
        }
    }

    #[test]
    fn rates_are_kept_and_the_draw_is_repeatable() {
        let settings = TroubleSettings { not_json: 0.01, late: 0.2, ..TroubleSettings::default() };
        let table = settings.table();
        let draws: Vec<Flaw> = (0..100_000).map(|sequence| table.draw(1, 7, sequence)).collect();
        let count = |flaw| draws.iter().filter(|drawn| **drawn == flaw).count();
        assert!((900..1100).contains(&count(Flaw::NotJson)));
        assert!((19_500..20_500).contains(&count(Flaw::Late)));
        assert_eq!(count(Flaw::NotJson) + count(Flaw::Late) + count(Flaw::None), 100_000);
        assert!((0..1000).all(|sequence| table.draw(1, 7, sequence) == draws[sequence as usize]));
        let all = TroubleSettings { duplicate: 1.0, ..TroubleSettings::default() }.table();
        assert!((0..1000).all(|sequence| all.draw(1, 7, sequence) == Flaw::Duplicate));
    }

    #[test]
    fn in_an_array_one_reading_is_lost_or_all() {
        let spared = |flaw: Flaw, n| (0..n).filter(|reading| flaw.spares(*reading, n)).count();
        assert_eq!(spared(Flaw::WrongType, 10), 9);
        assert_eq!(spared(Flaw::WrongType, 1), 0);
        assert_eq!(spared(Flaw::NotJson, 10), 0);
        assert_eq!(spared(Flaw::Late, 10), 10);
    }
}
