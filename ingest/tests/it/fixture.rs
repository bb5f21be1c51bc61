//! One database for a test, and readings to put into it.

use std::time::Duration;

use bytes::Bytes;
use ingest::batch::{Batch as _, Committed, Path};
use ingest::database::Database;
use ingest::delivery::{Ack, Delivery};
use ingest::failure::WriteError;
use ingest::partitions::{self, Layout};
use ingest::reading::Rules;
use ingest::recent::Recent;
use ingest::settings::{DatabaseSettings, IngestSettings};
use ingest::telemetry::Batch;
use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role};
use playground::scratch::Scratch;
use service::health::Health;
use service::secret::Secret;
use tokio::time::Instant;

pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) struct Fixture {
    pub(crate) cluster: Cluster,
    pub(crate) database: Database,
    pub(crate) db: Db,
    pub(crate) now_us: i64,
    recent: Recent,
    _scratch: Scratch,
}

impl Fixture {
    /// An empty schema with partitions for now.
    pub(crate) async fn new(options: Options) -> Self {
        let scratch = Scratch::new().unwrap();
        let cluster = Cluster::start(&scratch, options).await.unwrap();
        let settings = DatabaseSettings {
            hosts: format!("127.0.0.1:{}", cluster.primary().port()),
            password: Secret::new(cluster.primary().passwords().of(Role::Owner)),
            commit_timeout: Duration::from_secs(5),
            ..DatabaseSettings::default()
        };
        let database = Database::new(&settings, 2, Health::default().dependency("postgres")).unwrap();
        let mut client = database.client().await.unwrap();
        ingest::schema::migrate(&mut client).await.unwrap();
        let now_us = jiff::Timestamp::now().as_microsecond();
        partitions::ensure(&mut client, &layout(), &layout().cells([now_us].into_iter())).await.unwrap();
        drop(client);
        let db = cluster.connect(Role::Owner).await.unwrap();
        Self { cluster, database, db, now_us, recent: Recent::default(), _scratch: scratch }
    }

    /// Forgets what was seen before: the next batch finds out the hard way.
    pub(crate) fn forget(&mut self) {
        self.recent = Recent::default();
    }

    pub(crate) fn push(&mut self, batch: &mut Batch, delivery: Delivery) {
        batch.push(delivery, self.now_us, &mut self.recent);
    }

    pub(crate) fn batch(&self) -> Batch {
        let (oldest_us, newest_us) = layout().window(self.now_us);
        Batch::new("mqtt", Rules { oldest_us, newest_us, max_payload_bytes: 1 << 20 })
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
        let mut client = self.database.client().await.unwrap();
        let mut path = Path::Fast;
        for _ in 0..4 {
            match batch.commit(&mut client, path, patience).await {
                Ok(committed) => return Ok(committed),
                Err(WriteError::Duplicate) => path = Path::Merge,
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
    Delivery {
        topic: Bytes::from(format!("og/field/S/turbine/D-{number}")),
        payload: Bytes::from(payload.to_owned()),
        ack: Some(Ack { connection: 1, id: number as u64 }),
        received: Instant::now(),
    }
}
