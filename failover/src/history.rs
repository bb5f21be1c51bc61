//! Every change of the primary, for ever, in a file that shows when somebody has changed it.
//!
//! One JSON object a line; each carries the SHA-256 of the one before it, so that an entry altered, removed or
//! inserted later breaks the chain from there on. A last line that a crash cut short is no entry: it is removed at the
//! next start. Nothing here is ever rewritten.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use failover_api::Verification;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use crate::journal::{Failure, Operation};

/// What the first entry carries in place of a predecessor's hash.
const START: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// One entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Entry {
    /// From 1, without gaps.
    pub number: u64,
    /// Hash of the entry before.
    pub previous: String,
    pub operation: Operation,
    #[schema(value_type = String)]
    pub ended_at: Timestamp,
    /// By a clock that nobody sets.
    pub total_duration_ms: f64,
    pub success: bool,
    pub failure: Option<Failure>,
    /// SHA-256 of the entry's text as it stands in the file.
    #[serde(skip)]
    pub hash: String,
}

/// One line of the file. The hash is of the text itself: numbers read and written again need not look the same.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    hash: String,
    #[serde(borrow)]
    entry: &'a RawValue,
}

/// The file `history.jsonl`.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    entries: Vec<Entry>,
}

impl History {
    /// Reads the history of `dir`. A broken chain is reported by [`Verifier::verify`], not here: it must not keep the
    /// orchestrator from its work.
    ///
    /// # Errors
    /// When the file cannot be read or a line cannot be understood.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("history.jsonl");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            tracing::warn!(path = %path.display(), "the last line of the history was cut short by a crash; removed");
            let file = OpenOptions::new().write(true).open(&path).context("open the history")?;
            file.set_len(whole as u64).context("cut the history")?;
            file.sync_all().context("flush the history")?;
        }
        let entries = text
            .get(..whole)
            .unwrap_or_default()
            .lines()
            .enumerate()
            .map(|(index, line)| {
                read(line).with_context(|| format!("{}: line {}", path.display(), index + 1))
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { path, entries })
    }

    /// Oldest first.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of an operation.
    #[must_use]
    pub fn find(&self, operation: &str) -> Option<&Entry> {
        self.entries.iter().rev().find(|entry| entry.operation.id == operation)
    }

    /// Appends an entry of an operation that took so long, and flushes it. An operation that has one already (we died between this and the state) keeps it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn append(
        &mut self,
        operation: Operation,
        failure: Option<Failure>,
        took: Duration,
    ) -> anyhow::Result<&Entry> {
        if let Some(at) = self.entries.iter().position(|entry| entry.operation.id == operation.id) {
            return self.entries.get(at).context("the entry is there");
        }
        let ended_at = operation.started_at.saturating_add(took).unwrap_or(operation.started_at);
        let mut entry = Entry {
            number: self.entries.len() as u64 + 1,
            previous: self.entries.last().map_or_else(|| START.to_owned(), |entry| entry.hash.clone()),
            operation,
            ended_at,
            total_duration_ms: took.as_secs_f64() * 1000.0,
            success: failure.is_none(),
            failure,
            hash: String::new(),
        };
        let text = serde_json::value::to_raw_value(&entry).context("write a history entry")?;
        entry.hash = hash(text.get());
        let line = Line { hash: entry.hash.clone(), entry: &text };
        let mut line = serde_json::to_string(&line).context("write a history entry")?;
        line.push('\n');
        let new = !self.path.exists();
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path)
            .with_context(|| format!("open {}", self.path.display()))?;
        file.write_all(line.as_bytes()).and_then(|()| file.sync_all()).context("append to the history")?;
        if new && let Some(dir) = self.path.parent() {
            File::open(dir).and_then(|dir| dir.sync_all()).context("flush the directory")?;
        }
        self.entries.push(entry);
        self.entries.last().context("the entry was just added")
    }

    /// What is needed to check the file without holding the history.
    #[must_use]
    pub fn verifier(&self) -> Verifier {
        Verifier { path: self.path.clone(), known: self.entries.len() as u64 }
    }
}

/// Checks the file as it stands, beside one who appends to it.
#[derive(Debug, Clone)]
pub struct Verifier {
    path: PathBuf,
    known: u64,
}

impl Verifier {
    /// Reads the file again and checks every hash. `now` says how many entries were written by the time it was read: more
    /// than that are not ours.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn verify(&self, now: impl FnOnce() -> u64) -> anyhow::Result<Verification> {
        let mut lines = match File::open(&self.path) {
            Ok(file) => Some(BufReader::new(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("open {}", self.path.display())),
        };
        let mut entries = 0;
        let mut previous = START.to_owned();
        let mut line = String::new();
        while let Some(lines) = &mut lines {
            line.clear();
            lines.read_line(&mut line).with_context(|| format!("read {}", self.path.display()))?;
            // One without its end is being written.
            let Some(whole) = line.strip_suffix('\n') else { break };
            match check(whole, entries + 1, &previous) {
                Ok(hash) => previous = hash,
                Err(error) => {
                    let broken = Some(format!("line {}: {error:#}", entries + 1));
                    return Ok(Verification { entries, intact: false, broken });
                }
            }
            entries += 1;
        }
        let written = now().max(self.known);
        let broken = (entries < self.known || entries > written)
            .then(|| format!("{entries} entries in the file, {written} were written"));
        Ok(Verification { entries, intact: broken.is_none(), broken })
    }
}

fn check(line: &str, number: u64, previous: &str) -> anyhow::Result<String> {
    let entry = read(line).context("not an entry")?;
    if entry.number != number {
        bail!("its number is {}, expected {number}", entry.number);
    }
    if entry.previous != previous {
        bail!("it does not follow the entry before");
    }
    let text: Line<'_> = serde_json::from_str(line)?;
    if hash(text.entry.get()) != entry.hash {
        bail!("its content does not match its hash");
    }
    Ok(entry.hash)
}

fn read(line: &str) -> anyhow::Result<Entry> {
    let line: Line<'_> = serde_json::from_str(line)?;
    let entry: Entry = serde_json::from_str(line.entry.get())?;
    Ok(Entry { hash: line.hash, ..entry })
}

fn hash(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use failover_api::Kind;

    use super::*;
    use crate::journal::Request;
    use crate::state::State;

    fn operation(id: &str) -> Operation {
        let state = State::first("region1".into(), "s".into(), Default::default());
        let request = Request {
            id: id.into(),
            kind: Kind::Planned,
            target: "region2".into(),
            actor: "test".into(),
            reason: "because".into(),
            started_at: Timestamp::UNIX_EPOCH,
            wait_for: Default::default(),
            standbys: Default::default(),
            addresses: Default::default(),
            timeline: 1,
            marker: 0,
            acknowledged: Default::default(),
            bytes_at_risk: Some(0),
            two_copies: false,
        };
        state.opened(request)
    }

    fn filled(dir: &Path) -> History {
        let mut history = History::open(dir).unwrap();
        for id in ["a", "b", "c"] {
            history.append(operation(id), None, Duration::ZERO).unwrap();
        }
        history
    }

    fn verified(history: &History) -> Verification {
        history.verifier().verify(|| history.entries().len() as u64).unwrap()
    }

    #[test]
    fn a_duration_is_what_was_measured() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(dir.path()).unwrap();
        // Of a clock that was set back meanwhile nothing is to be seen.
        let entry = history.append(operation("a"), None, Duration::from_millis(1500)).unwrap();
        assert!((entry.total_duration_ms - 1500.0).abs() < 1e-9);
        assert_eq!(entry.ended_at, Timestamp::from_millisecond(1500).unwrap());
    }

    /// The check takes a copy of what it needs: entries may be appended while it reads, but only ours.
    #[test]
    fn is_verified_beside_one_who_appends() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = filled(dir.path());
        let verifier = history.verifier();
        history.append(operation("d"), None, Duration::ZERO).unwrap();
        let verification = verifier.verify(|| history.entries().len() as u64).unwrap();
        assert!(verification.intact, "{verification:?}");
        assert_eq!(verification.entries, 4);
        let verification = verifier.verify(|| 3).unwrap();
        assert!(!verification.intact, "an entry that nobody wrote: {verification:?}");
    }

    #[test]
    fn survives_a_restart_and_a_line_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path());
        let path = dir.path().join("history.jsonl");
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"number\":4,\"prev");
        std::fs::write(&path, text).unwrap();
        let mut history = History::open(dir.path()).unwrap();
        assert_eq!(history.entries().len(), 3);
        assert!(verified(&history).intact);
        history.append(operation("c"), None, Duration::ZERO).unwrap();
        assert_eq!(history.entries().len(), 3, "never twice");
        history.append(operation("d"), None, Duration::ZERO).unwrap();
        assert_eq!(verified(&History::open(dir.path()).unwrap()).entries, 4);
    }

    #[test]
    fn shows_what_was_tampered_with() {
        type Tamper = fn(Vec<String>) -> Vec<String>;
        let cases: [(Tamper, &str); 4] = [
            (
                |mut lines| {
                    lines[1] = lines[1].replace("because", "whatever");
                    lines
                },
                "line 2",
            ),
            (
                |mut lines| {
                    lines.remove(1);
                    lines
                },
                "line 2",
            ),
            (
                |mut lines| {
                    lines.swap(0, 1);
                    lines
                },
                "line 1",
            ),
            (
                |mut lines| {
                    lines.pop();
                    lines
                },
                "3 were written",
            ),
        ];
        for (tamper, named) in cases {
            let dir = tempfile::tempdir().unwrap();
            let history = filled(dir.path());
            let path = dir.path().join("history.jsonl");
            let lines =
                std::fs::read_to_string(&path).unwrap().lines().map(|line| format!("{line}\n")).collect();
            std::fs::write(&path, tamper(lines).concat()).unwrap();
            let verification = verified(&history);
            assert!(!verification.intact);
            assert!(verification.broken.as_ref().unwrap().contains(named), "{verification:?}");
        }
    }
}
