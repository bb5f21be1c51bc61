//! Logs by `tracing`, on standard error, as text or as one JSON object a line.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// How a process logs, on standard error.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// `json` writes one object per line.
    pub format: LogFormat,
    /// Log levels, for all modules or for each module: `info`, or `info,ingest=debug`.
    pub filter: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".into() }
    }
}

impl LogSettings {
    /// # Errors
    /// When `log.filter` is not a `tracing` filter.
    pub fn check(&self) -> Result<(), String> {
        self.parse_filter().map(drop).map_err(|error| format!("log.filter: {error}"))
    }

    fn parse_filter(&self) -> Result<EnvFilter, ParseError> {
        // lapin logs as an error what it also returns as one, which is said where it is handled. Later words win.
        EnvFilter::builder().parse(format!("lapin=off,{}", self.filter))
    }
}

/// Starts logging for the whole process. Later calls change nothing.
pub fn init(settings: &LogSettings) {
    let filter = settings.parse_filter().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match settings.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    drop(done);
}
