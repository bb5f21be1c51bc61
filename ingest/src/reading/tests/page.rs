//! Every example of docs/devices.md, against the decoder.

use serde_json::{Value, json};

use super::*;
use crate::settings::IngestSettings;
use crate::timestamp;
use crate::tolerated::Tolerated;

const PAGE: &str = include_str!("../../../../docs/devices.md");

/// The message the page begins with.
fn message() -> &'static str {
    PAGE.split_once("```json\n").unwrap().1.split_once("\n```").unwrap().0
}

/// What is between backticks.
fn spans(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The message with one member replaced.
fn with_member(member: &str) -> String {
    let key = member.split_once(':').unwrap().0;
    let (before, rest) = message().split_once(&format!("{key}:")).unwrap();
    // The member ends where the next one begins, or with the object.
    let end = rest.match_indices(", \"").map(|(at, _)| at).find(|at| {
        let value = rest.split_at(*at).0;
        value.matches('{').count() == value.matches('}').count()
    });
    format!("{before}{member}{}", rest.split_at(end.unwrap_or(rest.len() - 1)).1)
}

/// Default settings with some of `[ingest]` changed.
fn tolerance(changes: &[&str]) -> Tolerance {
    let mut settings = serde_json::to_value(IngestSettings::default()).unwrap();
    for change in changes {
        let (key, value) = change.split_once(" = ").unwrap();
        let (section, key) = key.split_once('.').unwrap();
        let known =
            settings[section].get_mut(key).unwrap_or_else(|| panic!("no setting ingest.{section}.{key}"));
        *known = serde_json::from_str::<Value>(value).unwrap();
    }
    let settings: IngestSettings = serde_json::from_value(settings).unwrap();
    settings.check().unwrap();
    Tolerance::new(&settings)
}

fn check_member(sent: &str, result: &str) {
    let [member, settings @ ..] = &spans(sent)[..] else { panic!("{sent}") };
    let payload = with_member(member);
    let seen = seen_by(tolerance(settings), TOPIC, payload.as_bytes());
    let facts = spans(result);
    if result.starts_with("refused") {
        let [reason, error] = facts[..] else { panic!("{result}") };
        assert_eq!(seen.rejected.len(), 1, "{sent}");
        let rejection = &seen.rejected[0].1;
        assert_eq!((rejection.reason.as_str(), rejection.error.as_str()), (reason, error), "{sent}");
        return;
    }
    assert!(result.starts_with("stored"), "{result}");
    assert_eq!((seen.readings.len(), &seen.rejected), (1, &vec![]), "{sent}");
    let reading = &seen.readings[0];
    for what in Tolerated::ALL {
        assert_eq!(reading.tolerated.contains(what), facts.contains(&what.as_str()), "{sent}: {what:?}");
    }
    if let Some(time) = facts.iter().find(|fact| fact.ends_with('Z')) {
        assert_eq!(Some(reading.timestamp_us), timestamp::parse(time.as_bytes()), "{sent}");
    }
}

fn check_array(sent: &str, result: &str) {
    // R stands alone; the one in TURB does not.
    let mut parts = spans(sent)[0].split_inclusive([' ', ',', ']', '[']).enumerate();
    let array: String = parts
        .by_ref()
        .map(|(second, part)| match part.strip_prefix('R') {
            Some(rest) => message().replace("05:06.789Z", &format!("05:{second:02}Z")) + rest,
            None => part.to_owned(),
        })
        .collect();
    let seen = seen_by(Tolerance::default(), TOPIC, array.as_bytes());
    let found = format!("{} stored, {} refused", seen.readings.len(), seen.rejected.len());
    assert!(result.starts_with(&found), "{sent}: {found}");
    for reason in spans(result) {
        assert!(seen.rejected.iter().any(|(_, rejection)| rejection.reason.as_str() == reason), "{sent}");
    }
}

#[test]
fn every_example_of_the_page_is_true() {
    let mut examples = 0;
    for line in PAGE.lines().filter(|line| line.starts_with("| `")) {
        let (sent, result) = line.trim_matches('|').split_once(" | ").unwrap();
        let (sent, result) = (sent.trim(), result.trim());
        if sent.starts_with("`[") {
            check_array(sent, result)
        } else {
            check_member(sent, result)
        }
        examples += 1;
    }
    assert!(examples > 40, "{examples}");
    assert_eq!(seen(TOPIC, message().as_bytes()).readings.len(), 1);
    let number = with_member("\"device_id\": 417");
    let seen = seen_by(Tolerance::default(), b"og/field/TX-EAGLE/turbine/417", number.as_bytes());
    assert!(seen.readings[0].tolerated.contains(Tolerated::NumericId));
}

#[test]
fn the_page_names_every_setting_and_every_count() {
    let settings = json!(IngestSettings::default());
    for section in ["timestamps", "lenient"] {
        for key in settings[section].as_object().unwrap().keys() {
            assert!(PAGE.contains(&format!("{section}.{key}")), "ingest.{section}.{key} is not on the page");
        }
    }
    for what in Tolerated::ALL {
        assert!(PAGE.contains(&format!("`{}`", what.as_str())), "{what:?} is not on the page");
    }
}
