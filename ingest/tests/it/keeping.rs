//! A DBA changes the tables so that every statement of ours would go on to succeed, and rows would be lost or stored twice.

use std::time::Duration;

use ingest::partitions::{self, Table};
use playground::cluster::Options;
use playground::postgres::Role;
use tokio::task::JoinSet;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use crate::drift::{Writing, until};
use crate::fixture::{Fixture, connected, message};
use crate::prepare::maintenance;

/// Changed while rows are written: nothing more is written or acknowledged, until it is as it was. Whatever was acknowledged is
/// stored once.
async fn check_nothing_is_written(change: impl AsyncFnOnce(&Fixture) -> (String, String)) {
    let fixture = Fixture::new(Options::alone()).await;
    let writing = Writing::start(&fixture);
    let prepared = CancellationToken::new();
    let upkeep = maintenance(&fixture, &writing.metrics).run(prepared.clone(), CancellationToken::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(upkeep);
    prepared.cancelled().await;
    writing.send((0..10).map(|n| fixture.delivery(n, 0, "{}")).collect());
    writing.settled(10).await;
    let (change, back) = change(&fixture).await;
    alter(&fixture, &change).await;
    until("it is noticed", async || !fixture.health.failing().is_empty()).await;
    // One that is stored, one that is not, one that is no reading.
    let messages = vec![fixture.delivery(0, 0, "{}"), fixture.delivery(10, 0, "{}"), message(11, "not json")];
    writing.send(messages);
    until("the batch is held", async || writing.metrics.held_by_schema.get() > 0).await;
    assert!(writing.settlements.try_take().is_none(), "{change}: nothing is acknowledged");
    assert_eq!(fixture.readings().await, 10, "{change}");
    alter(&fixture, &back).await;
    let settled = writing.settled(3).await;
    assert_eq!(settled.iter().filter(|settled| settled.rejected.is_some()).count(), 1, "{change}");
    assert_eq!(fixture.readings().await, 11, "{change}");
    until("it is well again", async || fixture.health.failing().is_empty()).await;
    writing.end().await;
}

/// The upkeep makes and indexes partitions meanwhile: of two that wait for one another, or change the same row of the
/// catalogue, the server ends one, which a DBA tries again.
async fn alter(fixture: &Fixture, change: &str) {
    while let Err(error) = fixture.db.batch_execute(change).await {
        let deadlock = error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED);
        let same_row =
            error.as_db_error().is_some_and(|error| error.message() == "tuple concurrently updated");
        assert!(deadlock || same_row, "{error:?}");
    }
}

/// Nobody writes to it: the standby would not have it, and a crash would empty it.
#[tokio::test]
async fn a_partition_that_a_crash_empties() {
    check_nothing_is_written(async |fixture: &Fixture| {
        let client = connected(&fixture.database).await;
        let listing = partitions::list(&client, Table::DeviceTelemetry).await.unwrap();
        let newest = listing.partitions.last().unwrap().name.clone();
        (format!("ALTER TABLE {newest} SET UNLOGGED"), format!("ALTER TABLE {newest} SET LOGGED"))
    })
    .await;
}

const ADD_KEY: &str = "ALTER TABLE device_telemetry ADD PRIMARY KEY (timestamp_utc, device_id)";
const DROP_KEY: &str = "ALTER TABLE device_telemetry DROP CONSTRAINT device_telemetry_pkey";

#[tokio::test]
async fn a_table_without_its_key() {
    check_nothing_is_written(async |_: &Fixture| (DROP_KEY.into(), ADD_KEY.into())).await;
}

#[tokio::test]
async fn a_key_that_is_checked_too_late() {
    let change = format!("{DROP_KEY}; {ADD_KEY} DEFERRABLE INITIALLY DEFERRED");
    check_nothing_is_written(async |_: &Fixture| (change, format!("{DROP_KEY}; {ADD_KEY}"))).await;
}

#[tokio::test]
async fn a_collation_for_which_different_devices_are_equal() {
    let change = "CREATE COLLATION alike (provider = icu, locale = 'und-u-ks-level2', deterministic = false); \
         ALTER TABLE device_telemetry ALTER COLUMN device_id TYPE text COLLATE alike";
    let back = "ALTER TABLE device_telemetry ALTER COLUMN device_id TYPE text COLLATE \"C\"";
    check_nothing_is_written(async |_: &Fixture| (change.into(), back.into())).await;
}

/// The bytes that we send would be stored with a stray one in front.
#[tokio::test]
async fn documents_that_are_texts() {
    let change = "ALTER TABLE device_telemetry ALTER COLUMN metrics TYPE text USING metrics::text";
    let back = "ALTER TABLE device_telemetry ALTER COLUMN metrics TYPE jsonb USING metrics::jsonb";
    check_nothing_is_written(async |_: &Fixture| (change.into(), back.into())).await;
}

/// `fsync` is read anew with the configuration, in sessions that are open too.
#[tokio::test]
async fn a_server_that_no_longer_flushes() {
    let fixture = Fixture::new(Options::alone()).await;
    let writing = Writing::start(&fixture);
    writing.send((0..10).map(|n| fixture.delivery(n, 0, "{}")).collect());
    writing.settled(10).await;
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    admin.batch_execute("ALTER SYSTEM SET fsync = off").await.unwrap();
    admin.execute("SELECT pg_reload_conf()", &[]).await.unwrap();
    let off = "SELECT count(*) FROM pg_settings WHERE name = 'fsync' AND setting = 'off'";
    until("it is off", async || fixture.count(off).await > 0).await;
    writing.send((10..20).map(|n| fixture.delivery(n, 0, "{}")).collect());
    until("it is tried in vain", async || writing.metrics.retries.get() >= 3).await;
    assert!(writing.settlements.try_take().is_none(), "nothing is acknowledged");
    admin.batch_execute("ALTER SYSTEM RESET fsync").await.unwrap();
    admin.execute("SELECT pg_reload_conf()", &[]).await.unwrap();
    writing.settled(10).await;
    assert_eq!(fixture.readings().await, 20);
    writing.end().await;
}

/// A transaction that somebody has left open has changed the row of a reading that comes again.
#[tokio::test]
async fn a_row_that_somebody_holds_keeps_no_reading_waiting() {
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.set_patience(Duration::from_secs(2), Duration::from_secs(1));
    let writing = Writing::start(&fixture);
    writing.send((0..10).map(|n| fixture.delivery(n, 0, "{}")).collect());
    writing.settled(10).await;
    writing.end().await;
    let mut dba = fixture.cluster.connect(Role::Owner).await.unwrap();
    let open = dba.transaction().await.unwrap();
    open.batch_execute("UPDATE device_telemetry SET firmware = firmware").await.unwrap();
    // One that remembers nothing, and one that has seen them.
    let writing = Writing::start(&fixture);
    for first in [10, 20] {
        writing.send((0..first + 10).map(|n| fixture.delivery(n, 0, "{}")).collect());
        let settled = writing.settled(first + 10).await;
        assert!(settled.iter().all(|settled| settled.rejected.is_none()));
    }
    assert_eq!(fixture.readings().await, 30);
    open.rollback().await.unwrap();
    writing.end().await;
}
