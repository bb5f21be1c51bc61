//! What the fuzz targets share.

pub mod cost;
pub mod rows;

use std::sync::Arc;

use ingest::reading::{Rules, Tolerance};
use ingest::settings::{IngestSettings, LenientSettings, NoZone, TimestampSettings};

/// The site, type and device of every seed.
pub const TOPIC: &[u8] = b"og/field/TX-EAGLE/turbine/TURB-00417";

/// Rules by a byte of the input: the contract, the default, or everything that can be tolerated.
#[must_use]
pub fn rules(choice: u8) -> Rules {
    let tolerance = match choice % 3 {
        0 => Tolerance::strict(),
        1 => Tolerance::default(),
        _ => Tolerance::new(&IngestSettings {
            lenient: LenientSettings { non_finite_as_null: true, ..LenientSettings::default() },
            timestamps: TimestampSettings {
                no_zone: NoZone::Site,
                zones: "TX-EAGLE=America/Chicago".into(),
                ..TimestampSettings::default()
            },
            ..IngestSettings::default()
        }),
    };
    let rules = Rules::new(1_700_000_000_000_000, 1_800_000_000_000_000, 64 << 10);
    Rules { tolerance: Arc::new(tolerance), ..rules }
}
