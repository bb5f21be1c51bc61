//! Writes a JSON document so that a reader sees the old one or the new one, never half of one.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// Replaces `path` with `document` as JSON: temporary file beside it, fsync, rename, fsync of the folder. Blocking;
/// keep it off the tasks that publish.
///
/// # Errors
/// When the folder cannot be written; the old file is then still whole.
pub fn replace(path: &Path, document: &impl Serialize) -> anyhow::Result<()> {
    let temporary = beside(path);
    write(&temporary, document)
        .and_then(|()| fs::rename(&temporary, path).context("rename"))
        .with_context(|| format!("write {}", path.display()))
        .inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("sync {}", folder.display()))
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

fn write(path: &Path, document: &impl Serialize) -> anyhow::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 18, File::create(path)?);
    serde_json::to_writer(&mut file, document)?;
    file.write_all(b"\n")?;
    file.into_inner()?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_document_and_no_litter() {
        struct Broken;
        impl Serialize for Broken {
            fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
                Err(serde::ser::Error::custom("broken"))
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.json");
        replace(&path, &[1, 2]).unwrap();
        replace(&path, &[3]).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "[3]\n");
        let error = replace(&path, &Broken).unwrap_err();
        assert!(format!("{error:#}").contains("ledger.json"), "{error:#}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "[3]\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
