//! Section `[ingest.lenient]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Deviations from the message format that are accepted. Each is counted in `ingest_tolerated_total`
/// (docs/devices.md).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LenientSettings {
    /// Accept a byte order mark before a message and NUL bytes after it.
    pub padding: bool,
    /// Drop an optional field (firmware, status, location, tags) with a wrong type, and store the reading
    /// without it.
    pub drop_fields: bool,
    /// Accept numbers as `device_id`, `device_type` and `site_id`. The text of the number must match the
    /// topic.
    pub numeric_ids: bool,
    /// Store NaN, Infinity and -Infinity as null. `false`: the reading becomes a dead letter.
    pub non_finite_as_null: bool,
    /// Accept gzip and zstd messages, recognised by their first bytes. Decompressed they may have at most
    /// `ingest.max_payload`, and at most 32 times the sent size plus 4 KiB.
    pub compressed: bool,
    /// Acknowledge an empty MQTT message, which clears a retained topic. `false`: it becomes a dead letter.
    pub empty: bool,
}

impl Default for LenientSettings {
    fn default() -> Self {
        Self {
            padding: true,
            drop_fields: true,
            numeric_ids: true,
            non_finite_as_null: false,
            compressed: true,
            empty: true,
        }
    }
}
