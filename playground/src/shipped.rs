//! Where the files of `config/` and our own programs are found.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Reads a file of `config/`, for instance `mosquitto/mosquitto.conf`: from `$TIER0_CONFIG_DIR`, the working
/// directory's `config/`, or the source tree this program was built from; the first that has it.
///
/// # Errors
/// When none has it; the message lists where it was sought.
pub fn config(name: &str) -> anyhow::Result<String> {
    let path = config_path(name)?;
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// As [`config`], the path only.
///
/// # Errors
/// As [`config`].
pub fn config_path(name: &str) -> anyhow::Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config");
    let places: Vec<PathBuf> = std::env::var_os("TIER0_CONFIG_DIR")
        .map(PathBuf::from)
        .into_iter()
        .chain([PathBuf::from("config"), source])
        .map(|place| place.join(name))
        .collect();
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => bail!("config/{name} is in none of: {}", list(&places)),
    }
}

/// One of our own programs: beside the running one; from a test, beside the directory of test binaries.
///
/// # Errors
/// When it is not there, that is, not built.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("find the running program")?;
    let places: Vec<PathBuf> = me.ancestors().skip(1).take(2).map(|dir| dir.join(name)).collect();
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => bail!("{name} is not built (cargo build --bins); sought {}", list(&places)),
    }
}

/// A program of a Debian package: on the path, or in the directories for servers, which a user's path may lack.
///
/// # Errors
/// When it is not installed.
pub fn server(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin"), PathBuf::from("/sbin")])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed (make install)"))
}

/// The directory of Postgres' programs: `$TIER0_POSTGRES_BIN`, else the newest Debian package.
///
/// # Errors
/// When Postgres 15 or newer is not installed.
pub fn postgres_bin() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("TIER0_POSTGRES_BIN") {
        return Ok(PathBuf::from(dir));
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    versions
        .filter_map(|entry| {
            entry.file_name().to_str()?.parse::<u32>().ok().map(|n| (n, entry.path().join("bin")))
        })
        .filter(|(version, bin)| *version >= 15 && bin.join("postgres").is_file())
        .max_by_key(|(version, _)| *version)
        .map(|(_, bin)| bin)
        .context("Postgres 15 or newer is not installed below /usr/lib/postgresql (make install)")
}

fn list(places: &[PathBuf]) -> String {
    places.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
