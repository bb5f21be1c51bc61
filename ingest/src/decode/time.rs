//! A time in a message: RFC 3339 first, then what else is taken.

use super::{Rejection, Rules, described, number_text, shown, text};
use crate::dead_letter::Reason;
use crate::settings::NoZone;
use crate::timestamp::{self, Parsed};
use crate::tolerated::{Tolerances, Tolerated};

const EXAMPLE: &str = "not an RFC 3339 time such as 2026-02-03T04:05:06.789Z";

/// Microseconds since 1970, and what was tolerated. `site_id`: whose local time it is when it has no zone; a time of no site
/// is then UTC.
pub(crate) fn read(
    key: &str,
    raw: &str,
    site_id: Option<&str>,
    rules: &Rules,
) -> Result<(i64, Tolerances), Rejection> {
    let settings = &rules.tolerance.timestamps;
    let refused = |value: &str| Rejection::new(Reason::WrongType, format!("{key} is {value}, {EXAMPLE}"));
    if !raw.starts_with('"') {
        let number = if settings.epoch { number_text(key, raw)? } else { None };
        return match number.and_then(|number| timestamp::parse_epoch(number.as_bytes())) {
            Some(us) => Ok((us, Tolerated::EpochTime.into())),
            None => Err(refused(&described(raw))),
        };
    }
    let time = text(key, raw)?;
    let bytes = time.as_bytes();
    if let Some(parsed) = timestamp::parse_rfc_3339(bytes) {
        return settled(key, &time, parsed, site_id, rules, Tolerances::NONE);
    }
    if settings.iso_8601
        && let Some(parsed) = timestamp::parse_iso_8601(bytes)
    {
        return settled(key, &time, parsed, site_id, rules, Tolerated::Iso8601.into());
    }
    if settings.epoch
        && let Some(us) = timestamp::parse_epoch(bytes)
    {
        return Ok((us, Tolerated::EpochTime.into()));
    }
    Err(refused(&shown(raw)))
}

/// With its zone.
fn settled(
    key: &str,
    time: &str,
    parsed: Parsed,
    site_id: Option<&str>,
    rules: &Rules,
    mut tolerances: Tolerances,
) -> Result<(i64, Tolerances), Rejection> {
    let refused = |error: String| Err(Rejection::new(Reason::WrongType, error));
    let shown = shown(time);
    let mut us = parsed.utc();
    if !parsed.has_zone {
        tolerances.add(Tolerated::NoZone);
        match (rules.tolerance.timestamps.no_zone, site_id) {
            (NoZone::Refuse, _) => {
                return refused(format!("{key} {shown} has no zone (ingest.timestamps.no_zone is refuse)"));
            }
            (NoZone::Utc, _) | (NoZone::Site, None) => {}
            (NoZone::Site, Some(site_id)) => {
                let Some(zone) = rules.tolerance.zones.get(site_id) else {
                    let error = "has no zone, and the site is not in ingest.timestamps.zones";
                    return refused(format!("{key} {shown} {error}"));
                };
                us = parsed.in_zone(zone);
                if us.is_none() {
                    let error = "is skipped or shown twice by the clocks of the site";
                    return refused(format!("{key} {shown} has no zone and {error}"));
                }
            }
        }
    }
    match us {
        Some(us) => Ok((us, tolerances)),
        None => refused(format!("{key} {shown} is no leap second")),
    }
}
