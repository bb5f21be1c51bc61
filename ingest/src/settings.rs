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

/// Where the rows go: the replicated Postgres.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DatabaseSettings {
    /// All nodes, primary or not, as `host:port` separated by commas; the primary is found among them.
    pub hosts: String,
    /// Name of the database.
    pub name: String,
    /// The role the process logs in as.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// Longest wait for TCP, login and "are you the primary", for one node.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub connect_timeout: Duration,
    /// Longest wait for one batch, its commit on the standby included. Then the connection is dropped and the batch tried
    /// again; the commit is never cancelled, since a cancelled one would look like a good one.
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
    /// Writers, each with one database connection.
    pub writers: usize,
    /// A batch closes at so many rows, or by `max_bytes`, or by `max_age`, whichever is first.
    pub max_rows: usize,
    /// A batch closes at so many bytes.
    #[schemars(with = "String", extend("format" = "size"))]
    pub max_bytes: ByteSize,
    /// A batch closes when its oldest row has waited so long.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_age: Duration,
    /// Messages held at once, waiting or being written; at least `mqtt_consumer.receive_maximum`.
    pub queue_messages: usize,
    /// The same in bytes; the process needs about three times this at worst.
    #[schemars(with = "String", extend("format" = "size"))]
    pub queue_bytes: ByteSize,
    /// Larger messages become dead letters.
    #[schemars(with = "String", extend("format" = "size"))]
    pub max_payload: ByteSize,
    /// What becomes of a reading whose device and timestamp are stored already with another content: `conflict` makes it a
    /// dead letter, `merge` joins metrics that do not contradict the stored ones into the row.
    pub same_identity: SameIdentity,
    /// Dead letters of one device in an hour that are stored of what is no reading; those above are acknowledged and counted.
    pub dead_letters_per_device: u32,
    /// The same in bytes; at least twice `max_payload`. Readings that are refused for their time or by the table may take as much besides,
    /// in any number; so may the refused user events of one routing key.
    #[schemars(with = "String", extend("format" = "size"))]
    pub dead_letter_bytes_per_device: ByteSize,
    /// Older readings become dead letters, older partitions are dropped.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub retention: Duration,
    /// Readings further ahead of the clock become dead letters.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub future_tolerance: Duration,
    /// Width of one partition of `device_telemetry` in time; divides a day. The open partition has no index by device: a
    /// look-up by device scans its part of the key, so wider ones make look-ups slower, narrower ones planning.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub partition_width: Duration,
    /// Most that this machine's clock and the primary's may be apart. Beyond it nobody knows which one is right: the process says
    /// that it is not ready, nothing is dropped, and readings are accepted that either clock accepts.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub max_clock_offset: Duration,
    /// Dead letters older than this are dropped, a day at a time.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String", extend("format" = "time"))]
    pub dead_letter_retention: Duration,
    /// Most that `dead_letters` may take on disk, with its indexes. Above it the oldest day is dropped. When the current day alone takes
    /// half of it, payloads are no longer stored (their length and SHA-256 are); at three quarters letters are only counted.
    #[schemars(with = "String", extend("format" = "size"))]
    pub dead_letter_max_bytes: ByteSize,
    /// Load reports of web sites (`site_activity`) older than this are deleted. `mqtt-consumer` does it, as the owner of the tables.
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
