//! Section `[ingest.timestamps]`.

use std::collections::HashMap;

use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Timestamp formats accepted in addition to RFC 3339 (docs/devices.md).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TimestampSettings {
    /// Accept epoch times in seconds, milliseconds, microseconds or nanoseconds, as number or text. The
    /// magnitude determines the unit.
    pub epoch: bool,
    /// Accept ISO 8601 beyond RFC 3339: `+0100`, `+01`, a comma before the fraction, no seconds,
    /// `20260203T040506Z`.
    pub iso_8601: bool,
    /// How to interpret a time without a zone. `utc`: as UTC. `refuse`: the reading becomes a dead letter.
    /// `site`: as local time at the site (`zones`).
    pub no_zone: NoZone,
    /// Time zones of sites, for `no_zone = "site"`: `SITE=ZONE` separated by commas. Times of sites that are
    /// not listed are refused.
    #[schemars(extend("examples" = ["WY-ALPHA=America/Denver,TX-EAGLE=America/Chicago"]))]
    pub zones: String,
}

/// What a time without a zone is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoZone {
    Utc,
    Refuse,
    Site,
}

impl Default for TimestampSettings {
    fn default() -> Self {
        Self { epoch: true, iso_8601: true, no_zone: NoZone::Utc, zones: String::new() }
    }
}

impl TimestampSettings {
    /// The zone of each site that has one.
    ///
    /// # Errors
    /// One sentence naming the key.
    pub fn site_zones(&self) -> Result<HashMap<String, TimeZone>, String> {
        let entries = self.zones.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let zones: HashMap<String, TimeZone> = entries
            .map(|entry| {
                let (site, name) = entry
                    .split_once('=')
                    .map(|(site, name)| (site.trim(), name.trim()))
                    .filter(|(site, _)| !site.is_empty())
                    .ok_or_else(|| format!("ingest.timestamps.zones: {entry} is not SITE=ZONE"))?;
                let zone = TimeZone::get(name).map_err(|_| {
                    format!("ingest.timestamps.zones: {name} is no time zone, as Europe/Berlin is")
                })?;
                Ok((site.to_owned(), zone))
            })
            .collect::<Result<_, String>>()?;
        if self.no_zone == NoZone::Site && zones.is_empty() {
            return Err(
                "ingest.timestamps.zones must name a zone when ingest.timestamps.no_zone is site".into()
            );
        }
        Ok(zones)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_read_and_wrong_ones_refused_by_name() {
        let zones = |no_zone, zones: &str| {
            TimestampSettings { no_zone, zones: zones.into(), ..TimestampSettings::default() }.site_zones()
        };
        assert_eq!(zones(NoZone::Utc, " A=America/Denver , B = UTC,").unwrap().len(), 2);
        for (text, named) in [("A", "A is not SITE=ZONE"), ("=UTC", "=UTC"), ("A=Mars/Base", "Mars/Base")] {
            let error = zones(NoZone::Utc, text).unwrap_err();
            assert!(error.contains("ingest.timestamps.zones") && error.contains(named), "{error}");
        }
        assert!(zones(NoZone::Site, "").unwrap_err().contains("ingest.timestamps.zones"));
    }
}
