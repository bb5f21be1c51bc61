//! A Postgres primary and its synchronous standbys.
//!
//! Region N is the N-th node: `region1` is the primary at first start, the others are standbys by base backup, each
//! on a physical slot of its own name. A commit on the primary returns when the first attached standby has flushed it.

mod roles;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::future::join_all;
use tokio::sync::OnceCell;

use crate::account::private_file;
use crate::child::{POLL, Reach};
use crate::port::Port;
use crate::postgres::{DATABASE, Db, Passwords, Postgres, Role};
use crate::scratch::Scratch;

const ATTACH: Duration = Duration::from_secs(60);
const PASSWORDS: &str = "postgres-passwords.json";

/// What a cluster consists of.
#[derive(Debug, Clone)]
pub struct Options {
    /// Number of synchronous standbys; 0 is a primary alone, whose commits wait for nobody.
    pub standbys: usize,
    /// Settings over `config/postgres/postgresql.conf`, for every node.
    pub settings: Vec<(String, String)>,
    /// Ports by region; regions beyond take free ones.
    pub ports: Vec<u16>,
    /// Whether what `initdb` and `pg_basebackup` write is flushed. Not needed for data that is thrown away.
    pub sync: bool,
}

impl Default for Options {
    /// For tests: one synchronous standby, free ports, little memory.
    fn default() -> Self {
        Self {
            standbys: 1,
            settings: vec![("shared_buffers".into(), "128MB".into())],
            ports: Vec::new(),
            sync: false,
        }
    }
}

impl Options {
    /// For tests that need no standby: starts faster.
    #[must_use]
    pub fn alone() -> Self {
        Self { standbys: 0, ..Self::default() }
    }

    /// One more setting for every node.
    #[must_use]
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.settings.push((key.to_owned(), value.to_owned()));
        self
    }
}

/// The nodes. Dropping it kills them.
#[derive(Debug)]
pub struct Cluster {
    pub nodes: Vec<Postgres>,
    options: Options,
}

impl Cluster {
    /// A new cluster for a test, copied from one that is made once per process.
    ///
    /// # Errors
    /// When Postgres is not installed or does not come up.
    pub async fn start(scratch: &Scratch, options: Options) -> anyhow::Result<Self> {
        static TEMPLATE: OnceCell<Scratch> = OnceCell::const_new();
        let template = TEMPLATE
            .get_or_try_init(|| async {
                let template = Scratch::new()?;
                let mut cluster = Self::create(template.path(), Options::default()).await?;
                cluster.stop().await?;
                anyhow::Ok(template)
            })
            .await
            .context("make the cluster that tests copy")?;
        if options.standbys > 1 {
            return Self::create(scratch.path(), options).await;
        }
        let mut regions = vec!["region1"];
        if options.standbys == 1 {
            regions.push("region2");
        }
        for name in regions.iter().copied().chain([PASSWORDS]) {
            copy(&template.path().join(name), &scratch.path().join(name)).await?;
        }
        Self::open(scratch.path(), options).await
    }

    /// Makes a new cluster in `dir` and starts it: `initdb`, roles, database, base backups.
    ///
    /// # Errors
    /// When a step fails; the message names it and holds the end of the server's log.
    pub async fn create(dir: &Path, options: Options) -> anyhow::Result<Self> {
        Self::create_filled(dir, options, async |_| Ok(())).await
    }

    /// As [`Cluster::create`]; `fill` gets the owner's way to `tier0_db` and works while the standbys are cloned.
    ///
    /// # Errors
    /// As [`Cluster::create`], and those of `fill`.
    pub async fn create_filled(
        dir: &Path,
        options: Options,
        fill: impl AsyncFnOnce(tokio_postgres::Config) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let passwords = Passwords::random()?;
        let mut cluster = Self { nodes: nodes(dir, &options, &passwords)?, options };
        let sync = cluster.options.sync;
        let primary = cluster.primary_mut();
        primary.init(sync).await?;
        cluster.configure()?;
        cluster.primary_mut().start().await?;
        roles::create(cluster.primary(), &passwords).await?;
        let owner = cluster.primary().config(Role::Owner);
        tokio::try_join!(cluster.clone_standbys(&[]), fill(owner))?;
        cluster.require_standbys().await?;
        // Last: its presence says that the cluster is complete.
        let text = serde_json::to_string(&passwords).context("write the passwords")?;
        private_file(&dir.join(PASSWORDS), &text, None)?;
        Ok(cluster)
    }

    /// Starts a cluster whose data exists. A standby that has no data, or whose slot the primary no longer has, is
    /// cloned anew.
    ///
    /// # Errors
    /// As [`Cluster::create`].
    pub async fn open(dir: &Path, options: Options) -> anyhow::Result<Self> {
        let mut passwords = Self::passwords(dir)?;
        let older = passwords.complete()?;
        let mut cluster = Self { nodes: nodes(dir, &options, &passwords)?, options };
        let slots = cluster.primary().data().join("pg_replslot");
        let standbys = cluster.nodes.iter().skip(1);
        let usable: Vec<String> = standbys
            .filter(|node| node.data().join("PG_VERSION").is_file() && slots.join(node.name()).is_dir())
            .map(|node| node.name().to_owned())
            .collect();
        cluster.configure()?;
        let Some((primary, standbys)) = cluster.nodes.split_first_mut() else { bail!("a cluster has nodes") };
        // The standbys need not wait for the primary: they ask for it every 100 ms.
        let mut starts = Vec::new();
        for standby in standbys.iter_mut().filter(|node| usable.iter().any(|name| name == node.name())) {
            standby.follow(primary)?;
            starts.push(standby.start());
        }
        starts.push(primary.start());
        for result in join_all(starts).await {
            result?;
        }
        cluster.clone_standbys(&usable).await?;
        cluster.require_standbys().await?;
        if older {
            roles::create_watchers(cluster.primary(), &passwords).await?;
            let text = serde_json::to_string(&passwords).context("write the passwords")?;
            private_file(&dir.join(PASSWORDS), &text, None)?;
        }
        Ok(cluster)
    }

    /// Whether `dir` holds a cluster that was completely made.
    #[must_use]
    pub fn exists(dir: &Path) -> bool {
        dir.join(PASSWORDS).is_file()
    }

    /// The passwords of the cluster in `dir`.
    ///
    /// # Errors
    /// When there is none.
    pub fn passwords(dir: &Path) -> anyhow::Result<Passwords> {
        let text = std::fs::read_to_string(dir.join(PASSWORDS)).context("read the passwords")?;
        serde_json::from_str(&text).context("read the passwords")
    }

    /// Deletes what is left of a cluster, complete or not.
    ///
    /// # Errors
    /// When something cannot be deleted.
    pub fn remove(dir: &Path) -> anyhow::Result<()> {
        for entry in std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
            let path = entry.context("read the data directory")?.path();
            if path.join("PG_VERSION").is_file() || path.file_name().is_some_and(|name| name == "region1") {
                std::fs::remove_dir_all(&path).with_context(|| format!("delete {}", path.display()))?;
            }
        }
        Ok(())
    }

    #[must_use]
    #[allow(clippy::indexing_slicing, reason = "there is always a first node: every constructor makes it")]
    pub fn primary(&self) -> &Postgres {
        &self.nodes[0]
    }

    #[allow(clippy::indexing_slicing, reason = "there is always a first node: every constructor makes it")]
    pub fn primary_mut(&mut self) -> &mut Postgres {
        &mut self.nodes[0]
    }

    /// The first standby.
    ///
    /// # Panics
    /// When the cluster was started without one.
    #[must_use]
    #[allow(clippy::expect_used, reason = "asked of a cluster that was started with a standby")]
    pub fn standby(&self) -> &Postgres {
        self.nodes.get(1).expect("a cluster with a standby")
    }

    /// # Panics
    /// As [`Cluster::standby`].
    #[allow(clippy::expect_used, reason = "asked of a cluster that was started with a standby")]
    pub fn standby_mut(&mut self) -> &mut Postgres {
        self.nodes.get_mut(1).expect("a cluster with a standby")
    }

    /// A connection to `tier0_db` on the primary.
    ///
    /// # Errors
    /// When it fails.
    pub async fn connect(&self, role: Role) -> anyhow::Result<Db> {
        self.primary().connect(role).await
    }

    /// The settings by which our processes find this cluster.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        let hosts: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        vec![
            ("TIER0__DATABASE__HOSTS".into(), hosts.join(",")),
            ("TIER0__DATABASE__NAME".into(), DATABASE.into()),
            ("TIER0__DATABASE__USER".into(), Role::Owner.name().into()),
            ("TIER0__DATABASE__PASSWORD".into(), self.primary().passwords().of(Role::Owner).into()),
        ]
    }

    /// Waits until every standby streams and one of them is synchronous.
    ///
    /// # Errors
    /// When that takes more than a minute.
    pub async fn wait_synchronous(&self) -> anyhow::Result<()> {
        let standbys = i64::try_from(self.options.standbys).context("count standbys")?;
        if standbys == 0 {
            return Ok(());
        }
        let db = self.primary().admin().await?;
        let sql = "SELECT count(*) FILTER (WHERE state = 'streaming'), count(*) FILTER (WHERE sync_state = 'sync') \
                   FROM pg_stat_replication WHERE application_name LIKE 'region%'";
        let deadline = Instant::now() + ATTACH;
        loop {
            let row = db.query_one(sql, &[]).await.context("ask for attached standbys")?;
            let (streaming, synchronous): (i64, i64) = (row.get(0), row.get(1));
            if streaming >= standbys && synchronous >= 1 {
                return Ok(());
            }
            if Instant::now() > deadline {
                let tails: String =
                    self.nodes.iter().map(|node| crate::child::tail(node.log(), 10)).collect();
                bail!(
                    "{streaming} of {standbys} standbys stream, {synchronous} synchronous, after {ATTACH:?}{tails}"
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until the standby has replayed everything the primary has committed up to now.
    ///
    /// # Errors
    /// When that takes longer than `limit`, or a node does not answer.
    pub async fn wait_replayed(&self, limit: Duration) -> anyhow::Result<()> {
        let primary = self.primary().admin().await?;
        let target: String = primary
            .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
            .await
            .context("ask for the LSN")?
            .get(0);
        let deadline = Instant::now() + limit;
        for standby in self.nodes.iter().skip(1) {
            let db = standby.admin().await?;
            let sql = "SELECT coalesce(pg_last_wal_replay_lsn() >= $1::text::pg_lsn, false)";
            while !db.query_one(sql, &[&target]).await.context("ask for replay")?.get::<_, bool>(0) {
                if Instant::now() > deadline {
                    bail!("{} has not replayed {target} after {limit:?}", standby.name());
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Stops the primary first: with its standbys attached, they get everything it wrote.
    ///
    /// # Errors
    /// When a node does not end in time; the others are stopped all the same.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let mut outcome = Ok(());
        for node in &mut self.nodes {
            outcome = outcome.and(node.stop().await);
        }
        outcome
    }

    /// SIGKILL for every node.
    ///
    /// # Errors
    /// When a process stays.
    pub async fn kill9(&mut self) -> anyhow::Result<()> {
        for node in &mut self.nodes {
            node.kill9(Reach::Tree).await?;
        }
        Ok(())
    }

    /// Writes every node's configuration. Commits wait for nobody yet: a standby that is being cloned cannot confirm.
    fn configure(&self) -> anyhow::Result<()> {
        let mut made = self.nodes.iter().filter(|node| node.data().join("PG_VERSION").is_file());
        made.try_for_each(|node| node.configure(&self.options.settings))
    }

    /// Clones every standby but those named, and drops the slots of all others: a slot whose standby does not take
    /// part holds WAL back for nothing.
    async fn clone_standbys(&mut self, usable: &[String]) -> anyhow::Result<()> {
        let Some((primary, standbys)) = self.nodes.split_first_mut() else { bail!("a cluster has nodes") };
        primary
            .admin()
            .await?
            .execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
                 WHERE NOT active AND slot_name <> ALL ($1)",
                &[&usable],
            )
            .await
            .context("drop the slots of absent standbys")?;
        for standby in standbys.iter_mut().filter(|node| !usable.iter().any(|name| name == node.name())) {
            if standby.data().exists() {
                std::fs::remove_dir_all(standby.data()).context("delete a standby that cannot be used")?;
            }
            standby.clone_from(primary, self.options.sync).await?;
            standby.configure(&self.options.settings)?;
            standby.start().await?;
        }
        Ok(())
    }

    /// From here on commits wait for a standby.
    async fn require_standbys(&mut self) -> anyhow::Result<()> {
        let names: Vec<&str> = self.nodes.iter().skip(1).map(Postgres::name).collect();
        let names = if names.is_empty() { String::new() } else { format!("FIRST 1 ({})", names.join(", ")) };
        let mut settings = self.options.settings.clone();
        settings.push(("synchronous_standby_names".into(), names));
        let primary = self.primary_mut();
        primary.configure(&settings)?;
        primary.reload()?;
        self.wait_synchronous().await
    }
}

/// How to connect to `tier0_db` of a node that another process started.
#[must_use]
pub fn connection(port: u16, passwords: &Passwords, role: Role) -> tokio_postgres::Config {
    crate::postgres::config(port, passwords, role, DATABASE)
}

fn nodes(dir: &Path, options: &Options, passwords: &Passwords) -> anyhow::Result<Vec<Postgres>> {
    (0..=options.standbys)
        .map(|index| {
            let port = match options.ports.get(index) {
                Some(wanted) => Port::near(*wanted)?,
                None => Port::free()?,
            };
            Postgres::new(&format!("region{}", index + 1), dir, port, passwords.clone())
        })
        .collect()
}

/// Copies with owners and modes, sharing blocks where the file system can.
async fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let output = tokio::process::Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .args([from, to])
        .stdin(Stdio::null())
        .output()
        .await
        .context("run cp")?;
    if !output.status.success() {
        bail!("copy {}: {}", from.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
