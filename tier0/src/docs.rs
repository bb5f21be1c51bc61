//! Pages and files made from the code: `docs/configuration.md`, `config/tier0.toml`, `docs/metrics.md`.
//!
//! `make docs` writes them, a test compares them. What they say is said once: by the doc comments and defaults of the settings
//! types, and by the series the components register.

pub mod configuration;
pub mod metrics;

use std::path::{Path, PathBuf};

use anyhow::Context;

/// The root of the source tree this program was built from.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every made file, by its path from the root.
///
/// # Errors
/// When a dashboard or a rule cannot be read. Needs a runtime.
pub fn files() -> anyhow::Result<Vec<(&'static str, String)>> {
    let processes = configuration::processes();
    Ok(vec![
        ("config/tier0.toml", configuration::toml(&processes)?),
        ("docs/configuration.md", configuration::page(&processes)?),
        ("docs/metrics.md", metrics::page()?),
    ])
}

/// Writes them.
///
/// # Errors
/// As [`files`], or when one cannot be written.
pub fn write() -> anyhow::Result<()> {
    for (path, text) in files()? {
        std::fs::write(root().join(path), text).with_context(|| format!("write {path}"))?;
    }
    Ok(())
}
