//! One database for a test, and readings to put into it.

use std::time::Duration;

use bytes::Bytes;
use deadpool_postgres::Client;
use ingest::batch::committed::Committed;
use ingest::batch::{Batch as _, Path};
use ingest::database::Database;
use ingest::delivery::{Ack, Delivery};
use ingest::failure::WriteError;
use ingest::partitions::{self, Layout};
use ingest::reading::Rules;
use ingest::settings::{DatabaseSettings, IngestSettings, SameIdentity};
use ingest::telemetry::{Batch, Memory};
use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role};
use playground::scratch::Scratch;
use service::health::Health;
use service::secret::Secret;
use tokio::time::Instant;

use crate::aborting_proxy::AbortingProxy;

/// For what has to happen, on a busy machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Fixture {
    pub(crate) cluster: Cluster,
    pub(crate) database: Database,
    /// What the database says of itself.
    pub(crate) health: Health,
    pub(crate) db: Db,
    pub(crate) now_us: i64,
    memory: Memory,
    _scratch: Scratch,
}

impl Fixture {
    /// An empty schema with partitions for now.
    pub(crate) async fn new(options: Options) -> Self {
        let scratch = Scratch::new().unwrap();
        let cluster = Cluster::start(&scratch, options).await.unwrap();
        let health = Health::default();
        let database = database_on(&cluster, &[cluster.primary().port()], &health);
        let mut client = connected(&database).await;
        ingest::schema::migrate(&mut client).await.unwrap();
        let now_us = jiff::Timestamp::now().as_microsecond();
        partitions::ensure(&mut client, &layout(), &layout().cells([now_us].into_iter())).await.unwrap();
        drop(client);
        let db = cluster.connect(Role::Owner).await.unwrap();
        Self { cluster, database, health, db, now_us, memory: memory(), _scratch: scratch }
    }

    /// As [`Fixture::new`], but the database is reached through a proxy that can abort COPYs.
    pub(crate) async fn behind_aborting_proxy(options: Options) -> (Self, AbortingProxy) {
        let mut fixture = Self::new(options).await;
        let proxy = AbortingProxy::new(fixture.cluster.primary().port()).await;
        fixture.database = database_on(&fixture.cluster, &[proxy.port], &fixture.health);
        (fixture, proxy)
    }

    /// As [`Fixture::new`], but the database knows of both nodes.
    pub(crate) async fn on_both_nodes(options: Options) -> Self {
        let mut fixture = Self::new(options).await;
        let ports = [fixture.cluster.primary().port(), fixture.cluster.standby().port()];
        fixture.database = database_on(&fixture.cluster, &ports, &fixture.health);
        fixture
    }

    /// Gives up waiting for a connection, and for an answer, after these times.
    pub(crate) fn set_patience(&mut self, connect_timeout: Duration, commit_timeout: Duration) {
        let settings = settings_of(&self.cluster, &[self.cluster.primary().port()]);
        let settings = DatabaseSettings { connect_timeout, commit_timeout, ..settings };
        self.database = Database::new(&settings, 2, self.health.dependency("postgres")).unwrap();
    }

    /// Forgets what was seen before: the next batch finds out the hard way.
    pub(crate) fn forget(&mut self) {
        self.memory = memory();
    }

    /// Forgets what was seen before; devices are held to these settings from now on.
    pub(crate) fn remember(&mut self, settings: &IngestSettings) {
        self.memory = Memory::new(settings);
    }

    pub(crate) fn push(&mut self, batch: &mut Batch, delivery: Delivery) {
        batch.push(delivery, self.now_us, &mut self.memory);
    }

    pub(crate) fn batch(&self) -> Batch {
        self.batch_with(SameIdentity::Conflict)
    }

    pub(crate) fn batch_with(&self, same_identity: SameIdentity) -> Batch {
        let (oldest_us, newest_us) = layout().window(self.now_us);
        let rules = Rules::new(oldest_us, newest_us, 1 << 20);
        Batch::new("mqtt", Rules { same_identity, ..rules })
    }

    /// Commits as a writer does: the fast path first, then whatever the error asks for.
    pub(crate) async fn commit(&self, batch: &mut Batch) -> Committed {
        batch.seal();
        self.try_commit(batch, PATIENCE).await.unwrap()
    }

    /// As [`Fixture::commit`] of a sealed batch, once: an error of the server or network is the outcome, its connection thrown away.
    pub(crate) async fn try_commit(
        &self,
        batch: &mut Batch,
        patience: Duration,
    ) -> Result<Committed, WriteError> {
        let mut client = connected(&self.database).await;
        let mut path = Path::Fast;
        for _ in 0..4 {
            match batch.commit(&mut client, path, patience).await {
                Ok(committed) => return Ok(committed),
                Err(WriteError::Duplicate | WriteError::Swallowed { .. }) => path = Path::Merge,
                Err(WriteError::Data { .. }) => path = Path::Isolate,
                Err(WriteError::MissingPartition) => {
                    let needed = layout().cells(batch.timestamps());
                    partitions::ensure(&mut client, &layout(), &needed).await.unwrap();
                }
                Err(error) => {
                    self.database.discard(client, "outcome unknown");
                    return Err(error);
                }
            }
        }
        panic!("a batch takes at most three tries");
    }

    /// Lets the database refuse rows that hold the metric `poison`, as a number out of range.
    pub(crate) async fn refuse_poison(&self) {
        let rule = "CREATE FUNCTION refuse_poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                IF NEW.metrics ? 'poison' THEN RAISE EXCEPTION 'poison' USING ERRCODE = '22003'; END IF; \
                RETURN NEW; END $$; \
            CREATE TRIGGER refuse_poison BEFORE INSERT ON device_telemetry \
                FOR EACH ROW EXECUTE FUNCTION refuse_poison(); \
            CREATE TRIGGER refuse_poison BEFORE INSERT ON site_activity \
                FOR EACH ROW EXECUTE FUNCTION refuse_poison()";
        self.db.batch_execute(rule).await.unwrap();
    }

    pub(crate) async fn count(&self, sql: &str) -> i64 {
        self.db.query_one(sql, &[]).await.unwrap().get(0)
    }

    pub(crate) async fn readings(&self) -> i64 {
        self.count("SELECT count(*) FROM device_telemetry").await
    }

    /// A message of device `number`, `at_us` after now, with these metrics.
    pub(crate) fn delivery(&self, number: usize, at_us: i64, metrics: &str) -> Delivery {
        message(number, &reading(number, self.now_us + at_us, metrics))
    }
}

/// A session with the primary. Until one is known, and while the machine is busy, there may be none in the time that is set.
pub(crate) async fn connected(database: &Database) -> Client {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match database.client().await {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "no session within {PATIENCE:?}: {error}"),
        }
    }
}

/// A session, or the words with which it is refused: that nobody has answered yet is no refusal.
pub(crate) async fn try_connected(database: &Database) -> Result<Client, String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let words = match database.client().await {
            Ok(client) => return Ok(client),
            Err(error) => error.to_string(),
        };
        let late = ["no answer", "no session", "timed out"].iter().any(|late| words.contains(late));
        if !late || Instant::now() > deadline {
            return Err(words);
        }
    }
}

fn database_on(cluster: &Cluster, ports: &[u16], health: &Health) -> Database {
    Database::new(&settings_of(cluster, ports), 2, health.dependency("postgres")).unwrap()
}

fn settings_of(cluster: &Cluster, ports: &[u16]) -> DatabaseSettings {
    let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    DatabaseSettings {
        hosts: hosts.join(","),
        password: Secret::new(cluster.primary().passwords().of(Role::Owner)),
        commit_timeout: Duration::from_secs(5),
        ..DatabaseSettings::default()
    }
}

/// Session batches take any time.
pub(crate) fn session_rules() -> Rules {
    Rules::new(0, i64::MAX, 1 << 20)
}

pub(crate) fn session_event(session: &str) -> Delivery {
    let payload = format!(
        r#"{{"user_id":"u","session_id":"{session}","event":"login","connection_status":"active","timestamp":"2026-02-03T04:05:06Z"}}"#
    );
    Delivery::new(Bytes::from_static(b"q"), payload.into(), None, Instant::now())
}

fn memory() -> Memory {
    Memory::new(&IngestSettings::default())
}

pub(crate) fn layout() -> Layout {
    Layout::new(&IngestSettings::default())
}

pub(crate) fn reading(number: usize, at_us: i64, metrics: &str) -> String {
    let time = jiff::Timestamp::from_microsecond(at_us).unwrap();
    format!(
        r#"{{"device_id":"D-{number}","device_type":"turbine","site_id":"S","timestamp_utc":"{time}","metrics":{metrics}}}"#
    )
}

pub(crate) fn message(number: usize, payload: &str) -> Delivery {
    let ack = Ack { connection: 1, id: number as u64 };
    let topic = Bytes::from(format!("og/field/S/turbine/D-{number}"));
    Delivery::new(topic, Bytes::from(payload.to_owned()), Some(ack), Instant::now())
}
