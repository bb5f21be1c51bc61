//! Sections `[database]` and `[ingest]`.

mod lenient;
mod timestamps;

use std::time::Duration;

use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::secret::Secret;

pub use lenient::LenientSettings;
pub use timestamps::{NoZone, TimestampSettings};

/// The replicated Postgres that stores the rows.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DatabaseSettings {
    /// All nodes, primary and standbys, as `host:port` separated by commas. The process finds the primary
    /// among them.
    pub hosts: String,
    /// Name of the database.
    pub name: String,
    /// Role that the process uses to log in.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// Maximum time for TCP, login and the check for the primary, for one node.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub connect_timeout: Duration,
    /// Maximum time for one batch, including its commit on the standby. After that the connection is dropped
    /// and the batch is retried. The commit is never cancelled, because a cancelled commit would look
    /// successful.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub commit_timeout: Duration,
}

impl Default for DatabaseSettings {
    fn default() -> Self {
        Self {
            hosts: "127.0.0.1:5432,127.0.0.1:5433".into(),
            name: "tier0_db".into(),
            user: "tier0".into(),
            password: Secret::default(),
            connect_timeout: Duration::from_secs(2),
            commit_timeout: Duration::from_secs(10),
        }
    }
}

impl DatabaseSettings {
    /// The nodes as (host, port).
    ///
    /// # Errors
    /// When one is not `host:port`.
    pub fn nodes(&self) -> Result<Vec<(String, u16)>, String> {
        let nodes: Result<Vec<_>, String> = self
            .hosts
            .split(',')
            .map(str::trim)
            .filter(|node| !node.is_empty())
            .map(|node| {
                node.rsplit_once(':')
                    .and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)))
                    .ok_or_else(|| format!("database.hosts: {node} is not host:port"))
            })
            .collect();
        match nodes {
            Ok(nodes) if nodes.is_empty() => Err("database.hosts names no node".into()),
            other => other,
        }
    }

    /// # Errors
    /// One sentence naming the key.
    pub fn check(&self) -> Result<(), String> {
        self.nodes()?;
        for (key, value) in
            [("connect_timeout", self.connect_timeout), ("commit_timeout", self.commit_timeout)]
        {
            if value.is_zero() {
                return Err(format!("database.{key} must be above 0"));
            }
        }
        Ok(())
    }
}

/// What becomes of a reading whose device and timestamp are stored already with another content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SameIdentity {
    /// A dead letter of its own reason.
    #[default]
    Conflict,
    /// Its metrics are joined into the stored row where they do not contradict it; otherwise a dead letter. For devices
    /// that send each value by itself with a timestamp of whole seconds.
    Merge,
}

/// How messages become rows.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IngestSettings {
    /// Number of writers. Each has one database connection.
    pub writers: usize,
    /// A batch closes at this number of rows, at `max_bytes` or at `max_age`, whichever comes first.
    pub max_rows: usize,
    /// A batch closes at this size.
    #[schemars(with = "String", extend("format" = "size"))]
    pub max_bytes: ByteSize,
    /// A batch closes when its oldest row has waited this long.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_age: Duration,
    /// Maximum number of messages that wait or are being written; at least `mqtt_consumer.receive_maximum`.
    pub queue_messages: usize,
    /// The same limit in bytes. The process needs at most about three times this.
    #[schemars(with = "String", extend("format" = "size"))]
    pub queue_bytes: ByteSize,
    /// Larger messages become dead letters.
    #[schemars(with = "String", extend("format" = "size"))]
    pub max_payload: ByteSize,
    /// How to handle a reading whose device and timestamp are already stored with different content.
    /// `conflict`: it becomes a dead letter. `merge`: metrics that do not contradict the stored ones are
    /// joined into the row.
    pub same_identity: SameIdentity,
    /// Maximum number of dead letters per device and hour for invalid messages. Further ones are acknowledged
    /// and counted, not stored.
    pub dead_letters_per_device: u32,
    /// The same limit in bytes; at least twice `max_payload`. Readings refused for their time or by the table
    /// have a separate allowance of this size, without a limit in number. So have the refused user events of
    /// one routing key.
    #[schemars(with = "String", extend("format" = "size"))]
    pub dead_letter_bytes_per_device: ByteSize,
    /// Older readings become dead letters. Older partitions are dropped.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub retention: Duration,
    /// Readings further ahead of the clock than this become dead letters.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub future_tolerance: Duration,
    /// Time range of one partition of `device_telemetry`; must divide a day. The open partition has no index
    /// by device, so a look-up by device scans its part of the key. Wider partitions make look-ups slower;
    /// narrower ones make query planning slower.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub partition_width: Duration,
    /// Maximum difference between this machine's clock and the primary's. Beyond it the right clock is
    /// unknown: the process reports that it is not ready, drops nothing, and accepts readings that either
    /// clock accepts.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_clock_offset: Duration,
    /// Dead letters older than this are dropped, a day at a time.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub dead_letter_retention: Duration,
    /// Maximum size of `dead_letters` on disk, including indexes. Above it the oldest day is dropped. When
    /// the current day alone uses half of it, payloads are no longer stored (only their length and SHA-256).
    /// At three quarters dead letters are only counted.
    #[schemars(with = "String", extend("format" = "size"))]
    pub dead_letter_max_bytes: ByteSize,
    /// Load reports of web sites (`site_activity`) older than this are deleted. `mqtt-consumer` deletes them,
    /// because it owns the tables.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub site_activity_retention: Duration,
    pub timestamps: TimestampSettings,
    pub lenient: LenientSettings,
}

impl Default for IngestSettings {
    fn default() -> Self {
        Self {
            writers: 2,
            max_rows: 5_000,
            max_bytes: ByteSize::mib(4),
            max_age: Duration::from_millis(50),
            queue_messages: 100_000,
            queue_bytes: ByteSize::mib(64),
            max_payload: ByteSize::kib(256),
            same_identity: SameIdentity::Conflict,
            dead_letters_per_device: 1_000,
            dead_letter_bytes_per_device: ByteSize::mib(16),
            retention: Duration::from_secs(24 * 3600),
            future_tolerance: Duration::from_secs(300),
            partition_width: Duration::from_secs(60),
            max_clock_offset: Duration::from_secs(10),
            dead_letter_retention: Duration::from_secs(14 * 24 * 3600),
            dead_letter_max_bytes: ByteSize::gib(1),
            site_activity_retention: Duration::from_secs(90 * 24 * 3600),
            timestamps: TimestampSettings::default(),
            lenient: LenientSettings::default(),
        }
    }
}

impl IngestSettings {
    /// # Errors
    /// One sentence naming the key.
    pub fn check(&self) -> Result<(), String> {
        let day = Duration::from_secs(24 * 3600).as_micros();
        let width = self.partition_width.as_micros();
        if !(1..=64).contains(&self.writers) {
            return Err("ingest.writers must be from 1 to 64".into());
        }
        if self.max_rows == 0 || self.max_bytes.as_u64() == 0 {
            return Err("ingest.max_rows and ingest.max_bytes must be above 0".into());
        }
        // A COPY buffer is indexed with 32 bits.
        if self.max_bytes.as_u64() > 1 << 30 || self.max_payload.as_u64() > 256 << 20 {
            return Err("ingest.max_bytes must not exceed 1GiB, ingest.max_payload not 256MiB".into());
        }
        if self.queue_messages < self.max_rows {
            return Err("ingest.queue_messages must be at least ingest.max_rows".into());
        }
        if self.queue_bytes.as_u64() < self.max_payload.as_u64() {
            return Err("ingest.queue_bytes must be at least ingest.max_payload".into());
        }
        if self.dead_letters_per_device == 0 {
            return Err("ingest.dead_letters_per_device must be above 0".into());
        }
        if self.dead_letter_bytes_per_device.as_u64() < 2 * self.max_payload.as_u64() {
            return Err(
                "ingest.dead_letter_bytes_per_device must be at least twice ingest.max_payload".into()
            );
        }
        if width < 1_000_000 || !day.is_multiple_of(width) {
            return Err("ingest.partition_width must be at least 1s and divide a day".into());
        }
        if self.retention < self.partition_width {
            return Err("ingest.retention must be at least ingest.partition_width".into());
        }
        if self.max_clock_offset.is_zero() || self.max_clock_offset >= self.future_tolerance {
            return Err("ingest.max_clock_offset must be above 0 and below ingest.future_tolerance".into());
        }
        // A partition of dead letters holds a day.
        if self.dead_letter_retention.as_micros() < day || self.site_activity_retention.as_micros() < day {
            return Err(
                "ingest.dead_letter_retention and ingest.site_activity_retention must be at least 1day"
                    .into(),
            );
        }
        // One look at the sizes and the next are 2 s apart: what may come in between must be small beside the limit.
        if self.dead_letter_max_bytes.as_u64() < 16 << 20
            || self.dead_letter_max_bytes.as_u64() < 16 * self.max_payload.as_u64()
        {
            return Err(
                "ingest.dead_letter_max_bytes must be at least 16MiB and 16 times ingest.max_payload".into(),
            );
        }
        self.timestamps.site_zones()?;
        Ok(())
    }
}
