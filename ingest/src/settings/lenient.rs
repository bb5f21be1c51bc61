//! Section `[ingest.lenient]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is taken although the contract does not ask for it; each is counted in `ingest_tolerated_total` (docs/devices.md).
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LenientSettings {
    /// Take a byte order mark before a message and NUL bytes after it.
    pub padding: bool,
    /// Leave an optional field (firmware, status, location, tags) out when its type is wrong, and keep the reading.
    pub drop_fields: bool,
    /// Take `device_id`, `device_type` and `site_id` as numbers. The text of the number must be what the topic says.
    pub numeric_ids: bool,
    /// Store NaN, Infinity and -Infinity as null. `false`: the reading becomes a dead letter.
    pub non_finite_as_null: bool,
    /// Take messages in gzip and zstd, told by their first bytes. What they hold may be at most `ingest.max_payload`, and
    /// 32 times what was sent and 4 KiB.
    pub compressed: bool,
    /// Acknowledge an MQTT message without a byte, as a cleared retained topic sends it. `false`: it becomes a dead letter.
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
