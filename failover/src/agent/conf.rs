//! The files by which Postgres knows its role: `postgresql.auto.conf`, `standby.signal`, the password file.
//!
//! Only three settings are ours; whatever else somebody wrote by ALTER SYSTEM stays. Files are replaced, not
//! overwritten, and flushed before Postgres is told.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};
use failover_api::Node;
use nix::unistd::{Gid, Uid, User, chown, geteuid};

use crate::agent::settings::RegionAgent;
use crate::protocol::Upstream;

/// In `synchronous_standby_names` of a guarded standby: nobody bears this name, so nothing is acknowledged.
pub const GUARD: &str = "tier0_guard";
/// Content of a timeline's history file that only takes its number: no timeline descends from nothing, so Postgres
/// follows none of these, but the next promotion here gets a higher number.
const TAKEN: &str = "# taken by a timeline of another node (tier0)\n";
/// More than this is no history of failovers but a mistake.
const MOST_TAKEN: u32 = 1000;
/// Below the data directory: a copy in the making, and the data that it replaces until it is whole.
const COPY: &str = ".tier0-copy";
const ASIDE: &str = ".tier0-aside";
const OURS: [&str; 3] = ["primary_conninfo", "primary_slot_name", "synchronous_standby_names"];

/// Writes as the account Postgres runs as.
#[derive(Debug, Clone)]
pub struct Conf {
    data: PathBuf,
    passfile: PathBuf,
    node: Node,
    replication_user: String,
    owner: Option<(Uid, Gid)>,
    /// What `synchronous_standby_names` was last set to.
    waits: Arc<Mutex<Option<String>>>,
}

impl Conf {
    /// # Errors
    /// When we are root and the account does not exist.
    pub fn new(settings: &RegionAgent) -> anyhow::Result<Self> {
        let owner = if geteuid().is_root() {
            let user = User::from_name(&settings.account)
                .with_context(|| format!("look up user {}", settings.account))?
                .with_context(|| format!("region_agent.account: there is no user {}", settings.account))?;
            Some((user.uid, user.gid))
        } else {
            None
        };
        let conf = Self {
            data: settings.data.clone(),
            passfile: settings.data.with_extension("pgpass"),
            node: settings.node.clone(),
            replication_user: settings.replication_user.clone(),
            owner,
            waits: Arc::default(),
        };
        let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:");
        let line = format!(
            "*:*:*:{}:{}\n",
            escape(&settings.replication_user),
            escape(settings.replication_password.expose())
        );
        conf.replace(&conf.passfile, line.as_bytes())?;
        Ok(conf)
    }

    #[must_use]
    pub fn passfile(&self) -> &Path {
        &self.passfile
    }

    /// Sets what this node follows and whom its commits wait for; `None` leaves the latter as it is. False when the file
    /// was so already.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, upstream: Option<&Upstream>, names: Option<&str>) -> anyhow::Result<bool> {
        if let Some(names) = names {
            *self.waits.lock().unwrap_or_else(PoisonError::into_inner) = Some(names.to_owned());
        }
        let path = self.data.join("postgresql.auto.conf");
        let before = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let is = |line: &str, key: &str| line.trim_start().starts_with(key);
        let foreign = before.lines().filter(|line| !OURS.iter().any(|key| is(line, key)));
        let mut text: String = foreign.map(|line| format!("{line}\n")).collect();
        let set = |key: &str, value: &str| format!("{key} = '{}'\n", value.replace('\'', "''"));
        // In this order whatever changes, so that the same content is the same text.
        let [follows, slot, waits] = OURS;
        text += &set(follows, &upstream.map(|upstream| self.conninfo(upstream)).unwrap_or_default());
        text += &set(slot, &self.node);
        match names {
            Some(names) => text += &set(waits, names),
            None => {
                text.extend(before.lines().filter(|line| is(line, waits)).map(|line| format!("{line}\n")))
            }
        }
        let changed = text != before;
        if changed {
            self.replace(&path, text.as_bytes())?;
        } else {
            // A promotion writes what the detaching before it wrote. The content was flushed before it got its name; the
            // name may not have been.
            File::open(&self.data).and_then(|dir| dir.sync_all()).context("flush the data directory")?;
        }
        Ok(changed)
    }

    /// What commits were last told to wait for.
    #[must_use]
    pub fn waits(&self) -> Option<String> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the next start is as a standby.
    ///
    /// # Errors
    /// When the file cannot be created or removed.
    pub fn mark_standby(&self, standby: bool) -> anyhow::Result<()> {
        let path = self.data.join("standby.signal");
        if standby {
            return self.replace(&path, b"");
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", path.display()))
            }
            _ => File::open(&self.data).and_then(|dir| dir.sync_all()).context("flush the data directory"),
        }
    }

    #[must_use]
    pub fn is_standby(&self) -> bool {
        self.data.join("standby.signal").exists()
    }

    /// How a standby reaches its primary.
    #[must_use]
    pub fn conninfo(&self, upstream: &Upstream) -> String {
        format!(
            "host={} port={} user={} passfile='{}' application_name={} connect_timeout=2 keepalives_idle=2 \
             keepalives_interval=1 keepalives_count=3",
            upstream.host,
            upstream.port,
            self.replication_user,
            self.passfile.display(),
            self.node,
        )
    }

    /// Whom this node was told to follow, as [`Conf::write`] wrote it down; none where somebody else has written.
    #[must_use]
    pub fn upstream(&self) -> Option<Upstream> {
        let text = std::fs::read_to_string(self.data.join("postgresql.auto.conf")).ok()?;
        // The last one counts, as for Postgres.
        let line = text.lines().rfind(|line| line.trim_start().starts_with("primary_conninfo"))?;
        let value = |key: &str| {
            let rest = line.split_once(key)?.1;
            rest.split([' ', '\'']).next().filter(|value| !value.is_empty())
        };
        Some(Upstream { host: value("host=")?.to_owned(), port: value(" port=")?.parse().ok()? })
    }

    /// Makes sure that the next promotion, from timeline `own`, leads to one above `above`: another node has used the
    /// numbers in between for a history that is not here, and two histories under one number could not be told apart,
    /// neither by Postgres and `pg_rewind` nor by writers.
    ///
    /// # Errors
    /// When a file cannot be written, or so many are wanted that something must be wrong.
    pub fn take_timelines(&self, own: u32, above: u32) -> anyhow::Result<()> {
        ensure!(above.saturating_sub(own) <= MOST_TAKEN, "from timeline {own} to {above} is too far");
        for timeline in (own + 1..=above).filter(|timeline| *timeline > 1) {
            let path = self.data.join("pg_wal").join(format!("{timeline:08X}.history"));
            if !path.exists() {
                self.replace(&path, TAKEN.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Before a start: a standby on timeline `own` would take a number above it for its target, and give up.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn free_timelines(&self, own: u32) -> anyhow::Result<()> {
        let dir = self.data.join("pg_wal");
        for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let path = entry.context("list pg_wal")?.path();
            let number = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_suffix(".history"))
                .and_then(|number| u32::from_str_radix(number, 16).ok());
            if number.is_some_and(|number| number > own)
                && std::fs::read(&path).is_ok_and(|content| content == TAKEN.as_bytes())
            {
                std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Where a copy is made, cleared of an earlier one. Below the data directory: it may be the root of a volume.
    ///
    /// # Errors
    /// When it cannot be cleared.
    pub fn clear_copy(&self) -> anyhow::Result<PathBuf> {
        let copy = self.data.join(COPY);
        remove(&copy)?;
        Ok(copy)
    }

    /// Puts the copy in the place of the data, which is kept aside. May be repeated after an interruption.
    ///
    /// # Errors
    /// When something cannot be moved: the data is then neither the old nor the new.
    pub fn take_copy(&self) -> anyhow::Result<()> {
        let (copy, aside) = (self.data.join(COPY), self.data.join(ASIDE));
        if let Err(error) = std::fs::create_dir(&aside)
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(error).with_context(|| format!("make {}", aside.display()));
        }
        for path in list(&self.data)? {
            if path == copy || path == aside {
                continue;
            }
            let kept = aside.join(path.file_name().unwrap_or_default());
            if kept.exists() {
                // Of a copy that was not put in place to the end.
                remove(&path)?;
            } else {
                rename(&path, &kept)?;
            }
        }
        for path in list(&copy)? {
            // What an interrupted rebuild of the upstream has left there.
            if path.ends_with(COPY) || path.ends_with(ASIDE) {
                remove(&path)?;
                continue;
            }
            rename(&path, &self.data.join(path.file_name().unwrap_or_default()))?;
        }
        remove(&copy)?;
        File::open(&self.data).and_then(|dir| dir.sync_all()).context("flush the data directory")
    }

    /// Removes the data that was kept aside.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn drop_aside(&self) -> anyhow::Result<()> {
        remove(&self.data.join(ASIDE))
    }

    fn replace(&self, path: &Path, content: &[u8]) -> anyhow::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".tier0-new");
        let temporary = path.with_file_name(name);
        let result = (|| {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            if let Some((uid, gid)) = self.owner {
                chown(&temporary, Some(uid), Some(gid))?;
            }
            std::fs::rename(&temporary, path)?;
            path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
        })();
        result.with_context(|| format!("write {}", path.display()))
    }
}

fn list(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().context("list a directory")
}

fn rename(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::rename(from, to).with_context(|| format!("move {} to {}", from.display(), to.display()))
}

/// Removes a file or a whole directory; nothing there is as good.
fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.is_dir() && !path.is_symlink() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// `synchronous_standby_names` for "every one of these".
#[must_use]
pub fn names(wait_for: &BTreeSet<Node>) -> String {
    if wait_for.is_empty() {
        return String::new();
    }
    let quoted: Vec<String> = wait_for.iter().map(|node| format!("\"{node}\"")).collect();
    format!("FIRST {} ({})", wait_for.len(), quoted.join(", "))
}

/// The nodes of a `synchronous_standby_names` that [`names`] wrote; anything else comes back as one name that no node
/// has, so that it never passes for what was wanted.
#[must_use]
pub fn parse_names(text: &str) -> BTreeSet<Node> {
    let nodes: BTreeSet<Node> = text
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'))
        .unwrap_or_default()
        .split(',')
        .map(|name| name.trim().trim_matches('"').to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    if names(&nodes) == text { nodes } else { [format!("?{text}")].into() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use service::secret::Secret;

    #[test]
    fn names_mean_all_of_them() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        for nodes in [set(&[]), set(&["region2"]), set(&["region2", "region3"])] {
            assert_eq!(parse_names(&names(&nodes)), nodes);
        }
        assert_eq!(names(&set(&["a", "b"])), "FIRST 2 (\"a\", \"b\")");
        for other in ["FIRST 1 (\"a\", \"b\")", "ANY 1 (a)", "a", "*"] {
            assert_eq!(parse_names(other), set(&[&format!("?{other}")]), "not ours: {other}");
        }
    }

    fn conf(data: &Path) -> Conf {
        std::fs::create_dir(data).unwrap();
        let settings = RegionAgent {
            data: data.to_owned(),
            replication_password: Secret::new("p:w"),
            account: User::from_uid(geteuid()).unwrap().unwrap().name,
            ..RegionAgent::default()
        };
        Conf::new(&settings).unwrap()
    }

    #[test]
    fn whom_it_followed_is_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let conf = conf(&dir.path().join("data"));
        assert_eq!(conf.upstream(), None, "no file yet");
        let upstream = Upstream { host: "10.0.0.7".into(), port: 5433 };
        conf.write(Some(&upstream), None).unwrap();
        assert_eq!(conf.upstream(), Some(upstream));
        conf.write(None, None).unwrap();
        assert_eq!(conf.upstream(), None);
        for text in [
            "primary_conninfo = ''\n",
            "primary_conninfo = 'host= port=1'\n",
            "primary_conninfo = 'host=a port=x'\n",
        ] {
            std::fs::write(dir.path().join("data/postgresql.auto.conf"), text).unwrap();
            assert_eq!(conf.upstream(), None, "{text}");
        }
    }

    #[test]
    fn numbers_of_timelines_are_taken_and_freed() {
        let dir = tempfile::tempdir().unwrap();
        let conf = conf(&dir.path().join("data"));
        let wal = dir.path().join("data/pg_wal");
        std::fs::create_dir(&wal).unwrap();
        std::fs::write(wal.join("00000003.history"), "1\t0/3000000\tno recovery target specified\n").unwrap();
        let there = || {
            let mut names: Vec<String> = std::fs::read_dir(&wal)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        conf.take_timelines(1, 1).unwrap();
        assert_eq!(there(), ["00000003.history"], "an ordinary failover takes none");
        conf.take_timelines(1, 4).unwrap();
        assert_eq!(there(), ["00000002.history", "00000003.history", "00000004.history"]);
        conf.free_timelines(2).unwrap();
        assert_eq!(there(), ["00000002.history", "00000003.history"], "only ours, only above its own");
        assert!(std::fs::read_to_string(wal.join("00000003.history")).unwrap().starts_with("1\t"));
        assert!(conf.take_timelines(1, 1_000_000).is_err());
    }

    /// The upstream was rebuilt once, and its agent was killed while it cleared up.
    #[test]
    fn a_copy_takes_its_place_without_what_a_rebuild_left_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let conf = conf(&data);
        let write = |path: &str| {
            let path = data.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        };
        write("base/old");
        write(".tier0-copy/base/new");
        write(".tier0-copy/.tier0-aside/base/older");
        write(".tier0-copy/.tier0-copy/base/half");
        conf.take_copy().unwrap();
        assert!(data.join("base/new").exists() && !data.join("base/old").exists());
        assert!(data.join(".tier0-aside/base/old").exists(), "until the rebuild has ended");
        assert!(!data.join(".tier0-aside/base/older").exists() && !data.join(".tier0-copy").exists());
        conf.drop_aside().unwrap();
        assert!(!data.join(".tier0-aside").exists());
    }

    #[test]
    fn foreign_settings_stay() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let conf = conf(&data);
        std::fs::write(
            data.join("postgresql.auto.conf"),
            "# Do not edit\nwork_mem = '1GB'\nprimary_conninfo = 'host=old'\n",
        )
        .unwrap();
        let upstream = Upstream { host: "h".into(), port: 7 };
        conf.write(Some(&upstream), Some("FIRST 1 (\"region2\")")).unwrap();
        conf.write(None, None).unwrap();
        let text = std::fs::read_to_string(data.join("postgresql.auto.conf")).unwrap();
        assert_eq!(
            text,
            "# Do not edit\nwork_mem = '1GB'\nprimary_conninfo = ''\nprimary_slot_name = 'region1'\n\
             synchronous_standby_names = 'FIRST 1 (\"region2\")'\n"
        );
        let written = || std::fs::metadata(data.join("postgresql.auto.conf")).unwrap().ino();
        let before = written();
        assert!(!conf.write(None, Some("FIRST 1 (\"region2\")")).unwrap());
        assert_eq!(written(), before, "a promotion that waits for the same ones writes nothing");
        assert!(std::fs::read_to_string(conf.passfile()).unwrap().ends_with(":replicator:p\\:w\n"));
        conf.mark_standby(true).unwrap();
        assert!(conf.is_standby());
        conf.mark_standby(false).unwrap();
        conf.mark_standby(false).unwrap();
        assert!(!conf.is_standby());
    }
}
