//! What a process does before it takes messages, and what is left of it when it is ended in the middle.

use std::time::Duration;

use ingest::clock::Clock;
use ingest::maintenance::Maintenance;
use ingest::metrics::Metrics;
use ingest::settings::IngestSettings;
use playground::cluster::Options;
use playground::postgres::Role;
use service::metrics::Registry;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::drift::until;
use crate::fixture::Fixture;

pub(crate) fn maintenance(fixture: &Fixture, metrics: &Metrics) -> Maintenance {
    let settings = IngestSettings::default();
    Maintenance {
        database: fixture.database.clone(),
        clock: Clock::new(&settings),
        settings,
        metrics: metrics.clone(),
        migrate: true,
        partitions: true,
    }
}

/// A statement of ours that waits for a lock.
const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tier0-ingest' AND wait_event_type = 'Lock'";

/// A migration that takes longer than any answer may, here because somebody reads its record, is not begun again.
#[tokio::test]
async fn a_long_migration_is_waited_for() {
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.set_patience(Duration::from_secs(2), Duration::from_millis(300));
    let mut dba = fixture.cluster.connect(Role::Owner).await.unwrap();
    let open = dba.transaction().await.unwrap();
    open.batch_execute("LOCK TABLE refinery_schema_history IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let (prepared, shutdown) = (CancellationToken::new(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(maintenance(&fixture, &metrics).run(prepared.clone(), shutdown.clone()));
    let admin = fixture.cluster.primary().admin().await.unwrap();
    let long = format!("{WAITING} AND clock_timestamp() - query_start > interval '6 seconds'");
    until("it waits for long", async || admin.query_one(&long, &[]).await.unwrap().get::<_, i64>(0) > 0)
        .await;
    open.rollback().await.unwrap();
    prepared.cancelled().await;
    assert_eq!(metrics.upkeep_failures.get(), 0);
    shutdown.cancel();
    tasks.join_next().await.unwrap().unwrap();
}

/// Whoever is ended while it works on the schema leaves nothing behind that another could be given.
#[tokio::test]
async fn a_connection_on_which_the_schema_was_worked_on_is_closed() {
    let fixture = Fixture::new(Options::alone()).await;
    let mut dba = fixture.cluster.connect(Role::Owner).await.unwrap();
    let open = dba.transaction().await.unwrap();
    open.batch_execute("LOCK TABLE refinery_schema_history IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let metrics = Metrics::new(&Registry::new()).unwrap();
    let shutdown = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(maintenance(&fixture, &metrics).run(CancellationToken::new(), shutdown.clone()));
    let admin = fixture.cluster.primary().admin().await.unwrap();
    let count = async |sql: &str| admin.query_one(sql, &[]).await.unwrap().get::<_, i64>(0);
    until("it waits", async || count(WAITING).await > 0).await;
    shutdown.cancel();
    tasks.join_next().await.unwrap().unwrap();
    open.rollback().await.unwrap();
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted";
    until("the migration lock is free", async || count(locks).await == 0).await;
}
