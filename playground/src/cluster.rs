//! A Postgres primary and its synchronous standbys.
//!
//! Region N is the N-th node: `region1` is the primary at first start, the others are standbys by base backup, each
//! on a physical slot of its own name. A commit on the primary returns when the first attached standby has flushed it.

mod setup;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::future::join_all;
use tokio::sync::OnceCell;

use crate::account::private_file;
use crate::child::{POLL, Reach};
use crate::postgres::{DATABASE, Db, Passwords, Postgres, Role};
use crate::scratch::Scratch;
use setup::{copy, create_roles, nodes, recorded_primary};

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
    /// Index of the primary, as last known.
    leader: usize,
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
        let mut cluster = Self::attach(dir, options, &passwords)?;
        let sync = cluster.options.sync;
        let primary = cluster.primary_mut();
        primary.init(sync).await?;
        cluster.configure()?;
        cluster.primary_mut().start().await?;
        create_roles(cluster.primary(), &passwords).await?;
        let owner = cluster.primary().config(Role::Owner);
        tokio::try_join!(cluster.clone_standbys(&[]), fill(owner))?;
        cluster.require_standbys().await?;
        // Last: its presence says that the cluster is complete.
        let text = serde_json::to_string(&passwords).context("write the passwords")?;
        private_file(&dir.join(PASSWORDS), &text, None)?;
        Ok(cluster)
    }

    /// The nodes of `dir` as they were left, none of them started.
    ///
    /// # Errors
    /// When user `postgres` is missing.
    pub fn attach(dir: &Path, options: Options, passwords: &Passwords) -> anyhow::Result<Self> {
        let nodes = nodes(dir, &options, passwords)?;
        let leader = recorded_primary(dir)
            .and_then(|name| nodes.iter().position(|node| node.name() == name))
            .unwrap_or(0);
        Ok(Self { nodes, options, leader })
    }

    /// Starts a cluster whose data exists. A standby that has no data, or whose slot the primary no longer has, is
    /// cloned anew.
    ///
    /// # Errors
    /// As [`Cluster::create`].
    pub async fn open(dir: &Path, options: Options) -> anyhow::Result<Self> {
        let passwords = Self::passwords(dir)?;
        let mut cluster = Self::attach(dir, options, &passwords)?;
        let slots = cluster.primary().data().join("pg_replslot");
        let usable: Vec<String> = cluster
            .standbys()
            .filter(|node| node.data().join("PG_VERSION").is_file() && slots.join(node.name()).is_dir())
            .map(|node| node.name().to_owned())
            .collect();
        cluster.configure()?;
        let (primary, standbys) = cluster.split()?;
        // The standbys need not wait for the primary: they ask for it every 100 ms.
        let mut starts = Vec::new();
        for standby in standbys.into_iter().filter(|node| usable.iter().any(|name| name == node.name())) {
            standby.follow(primary)?;
            starts.push(standby.start());
        }
        starts.push(primary.start());
        for result in join_all(starts).await {
            result?;
        }
        cluster.clone_standbys(&usable).await?;
        cluster.require_standbys().await?;
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
        let passwords: Passwords = serde_json::from_str(&text).context("read the passwords")?;
        if !passwords.is_complete() {
            bail!("the data was made by an older version without all roles; --fresh starts anew");
        }
        Ok(passwords)
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
    #[allow(clippy::indexing_slicing, reason = "every constructor makes the node that leads")]
    pub fn primary(&self) -> &Postgres {
        &self.nodes[self.leader]
    }

    #[allow(clippy::indexing_slicing, reason = "every constructor makes the node that leads")]
    pub fn primary_mut(&mut self) -> &mut Postgres {
        &mut self.nodes[self.leader]
    }

    /// All nodes but the primary.
    pub fn standbys(&self) -> impl Iterator<Item = &Postgres> {
        self.nodes.iter().enumerate().filter(|(index, _)| *index != self.leader).map(|(_, node)| node)
    }

    /// The first standby.
    ///
    /// # Panics
    /// When the cluster was started without one.
    #[must_use]
    #[allow(clippy::expect_used, reason = "asked of a cluster that was started with a standby")]
    pub fn standby(&self) -> &Postgres {
        self.standbys().next().expect("a cluster with a standby")
    }

    /// # Panics
    /// As [`Cluster::standby`].
    #[allow(clippy::expect_used, reason = "asked of a cluster that was started with a standby")]
    pub fn standby_mut(&mut self) -> &mut Postgres {
        let leader = self.leader;
        let mut standbys = self.nodes.iter_mut().enumerate().filter(|(index, _)| *index != leader);
        standbys.next().map(|(_, node)| node).expect("a cluster with a standby")
    }

    /// The primary and the others.
    fn split(&mut self) -> anyhow::Result<(&mut Postgres, Vec<&mut Postgres>)> {
        let (mut primary, mut standbys) = (None, Vec::new());
        for (index, node) in self.nodes.iter_mut().enumerate() {
            if index == self.leader {
                primary = Some(node);
            } else {
                standbys.push(node);
            }
        }
        Ok((primary.context("a cluster has a primary")?, standbys))
    }

    /// Somebody else decides who is primary from now on: this is the name.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn led_by(&mut self, name: &str) -> anyhow::Result<()> {
        let found = self.nodes.iter().position(|node| node.name() == name);
        self.leader = found.with_context(|| format!("there is no node {name}"))?;
        Ok(())
    }

    /// Stops every node and writes its configuration, so that agents can take over.
    ///
    /// # Errors
    /// As [`Cluster::stop`].
    pub async fn hand_over(&mut self) -> anyhow::Result<()> {
        self.stop().await?;
        self.nodes.iter().try_for_each(Postgres::make_parent)?;
        self.configure()
    }

    /// Names of the nodes that accept writes now, asked directly.
    pub async fn writable(&self) -> Vec<String> {
        let mut writable = Vec::new();
        for node in &self.nodes {
            if node.is_writable().await {
                writable.push(node.name().to_owned());
            }
        }
        writable
    }

    /// Waits until this node accepts writes. A node that gives no answer is asked again; another one that accepts them is one
    /// too many at any time.
    ///
    /// # Errors
    /// When another one accepts writes, or this one does not within `limit`.
    pub async fn leads_alone(&self, region: &str, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let writable = self.writable().await;
            if writable.iter().any(|name| name != region) {
                bail!("not {region} alone: {writable:?}");
            }
            if !writable.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{region} takes no writes within {limit:?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// A connection to `tier0_db` on the primary.
    ///
    /// # Errors
    /// When it fails.
    pub async fn connect(&self, role: Role) -> anyhow::Result<Db> {
        self.primary().connect(role).await
    }

    /// The settings by which a process of ours finds this cluster: one that makes tables, as their owner.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        self.environment_of(Role::Owner)
    }

    /// The same for rabbitmq-consumer, which needs no more than to add and change rows. The tables must be there.
    #[must_use]
    pub fn writer_environment(&self) -> Vec<(String, String)> {
        let mut environment = self.environment_of(Role::Writer);
        environment.push(("TIER0__RABBITMQ_CONSUMER__MIGRATE".into(), "false".into()));
        environment
    }

    fn environment_of(&self, role: Role) -> Vec<(String, String)> {
        let hosts: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        vec![
            ("TIER0__DATABASE__HOSTS".into(), hosts.join(",")),
            ("TIER0__DATABASE__NAME".into(), DATABASE.into()),
            ("TIER0__DATABASE__USER".into(), role.name().into()),
            ("TIER0__DATABASE__PASSWORD".into(), self.primary().passwords().of(role).into()),
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
        for standby in self.standbys() {
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
        let mut outcome = self.primary_mut().stop().await;
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
        let (settings, sync) = (self.options.settings.clone(), self.options.sync);
        let (primary, standbys) = self.split()?;
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
        for standby in standbys.into_iter().filter(|node| !usable.iter().any(|name| name == node.name())) {
            if standby.data().exists() {
                std::fs::remove_dir_all(standby.data()).context("delete a standby that cannot be used")?;
            }
            standby.clone_from(primary, sync).await?;
            standby.configure(&settings)?;
            standby.start().await?;
        }
        Ok(())
    }

    /// From here on commits wait for a standby.
    async fn require_standbys(&mut self) -> anyhow::Result<()> {
        let names: Vec<&str> = self.standbys().map(Postgres::name).collect();
        let names = if names.is_empty() { String::new() } else { format!("FIRST 1 ({})", names.join(", ")) };
        let mut settings = self.options.settings.clone();
        settings.push(("synchronous_standby_names".into(), names));
        let primary = self.primary_mut();
        primary.configure(&settings)?;
        primary.reload()?;
        self.wait_synchronous().await
    }
}

/// The primary in `dir` by the orchestrator's records, when there are any.
#[must_use]
pub(crate) fn recorded(dir: &Path) -> Option<String> {
    recorded_primary(dir)
}

/// How to connect to `tier0_db` of a node that another process started.
#[must_use]
pub fn connection(port: u16, passwords: &Passwords, role: Role) -> tokio_postgres::Config {
    crate::postgres::config(port, passwords, role, DATABASE)
}
