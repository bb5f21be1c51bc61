//! The temporary tables that readings and sessions go through: what is wrong with them is no row's fault.

use std::time::Duration;

use ingest::batch::committed::Committed;
use ingest::batch::{Batch as _, Path};
use ingest::failure::WriteError;
use ingest::session;
use ingest::settings::IngestSettings;
use playground::cluster::Options;
use playground::postgres::Role;
use tokio::time::{Instant, sleep};

use crate::drift::{Writing, until};
use crate::fixture::{Fixture, PATIENCE, connected, session_event, session_rules};

/// What a DBA adds beside our columns; the plain COPY works as before.
const COLUMNS: &[&str] =
    &["number int", "tier0_number int", "made int GENERATED ALWAYS AS (1) STORED NOT NULL"];

#[tokio::test]
async fn a_new_column_makes_no_letter_of_a_half_stored_batch() {
    for column in COLUMNS {
        let mut fixture = Fixture::new(Options::alone()).await;
        let mut batch = fixture.batch();
        for number in 0..10 {
            let delivery = fixture.delivery(number, 0, "{}");
            fixture.push(&mut batch, delivery);
        }
        fixture.commit(&mut batch).await;
        let change = format!("ALTER TABLE device_telemetry ADD COLUMN {column}");
        fixture.db.batch_execute(&change).await.unwrap();
        let writing = Writing::start(&fixture);
        writing.send((0..20).map(|n| fixture.delivery(n, 0, "{}")).collect());
        let settled = writing.settled(20).await;
        assert!(settled.iter().all(|settled| settled.rejected.is_none()), "{column}");
        assert_eq!(fixture.readings().await, 20, "{column}");
        assert_eq!(writing.metrics.duplicates.get(), 10, "{column}");
        writing.end().await;
    }
}

#[tokio::test]
async fn a_session_that_may_make_no_temporary_tables_holds_what_needs_them() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    for number in 0..10 {
        let delivery = fixture.delivery(number, 0, "{}");
        fixture.push(&mut batch, delivery);
    }
    fixture.commit(&mut batch).await;
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    admin.batch_execute("REVOKE TEMPORARY ON DATABASE tier0_db FROM tier0, PUBLIC").await.unwrap();
    let writing = Writing::start(&fixture);
    writing.send((0..20).map(|n| fixture.delivery(n, 0, "{}")).collect());
    until("the batch is held", async || writing.metrics.held_by_schema.get() > 0).await;
    // And stays so, without a word in between that all is well.
    let before = writing.metrics.retries.get();
    let deadline = Instant::now() + Duration::from_secs(120);
    while writing.metrics.retries.get() < before + 5 {
        assert_eq!(writing.metrics.held_by_schema.get(), 1);
        assert!(Instant::now() < deadline, "it is tried again");
        sleep(Duration::from_micros(100)).await;
    }
    assert!(writing.settlements.try_take().is_none(), "nothing is acknowledged");
    admin.batch_execute("GRANT TEMPORARY ON DATABASE tier0_db TO tier0").await.unwrap();
    assert!(writing.settled(20).await.iter().all(|settled| settled.rejected.is_none()));
    assert_eq!(fixture.readings().await, 20);
    writing.end().await;
}

/// As a writer does it, up to an error that is no row's.
async fn commit_sessions(fixture: &Fixture) -> Result<Committed, WriteError> {
    let mut batch = session::Batch::new("rabbitmq", session_rules());
    (0..5).for_each(|n| {
        batch.push(
            session_event(&format!("S-{n}")),
            fixture.now_us,
            &mut session::Batch::memory(&IngestSettings::default()),
        )
    });
    batch.seal();
    let mut client = connected(&fixture.database).await;
    match batch.commit(&mut client, Path::Fast, PATIENCE).await {
        Err(WriteError::Data { .. }) => batch.commit(&mut client, Path::Isolate, PATIENCE).await,
        other => other,
    }
}

#[tokio::test]
async fn a_new_column_makes_no_letters_of_sessions() {
    let fixture = Fixture::new(Options::alone()).await;
    let change = "ALTER TABLE user_sessions ADD COLUMN made int GENERATED ALWAYS AS (1) STORED NOT NULL";
    fixture.db.batch_execute(change).await.unwrap();
    assert_eq!(commit_sessions(&fixture).await.unwrap().rows, 5);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 0);
}

#[tokio::test]
async fn sessions_are_held_without_temporary_tables() {
    let fixture = Fixture::new(Options::alone()).await;
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    admin.batch_execute("REVOKE TEMPORARY ON DATABASE tier0_db FROM tier0, PUBLIC").await.unwrap();
    let outcome = commit_sessions(&fixture).await;
    assert!(matches!(outcome, Err(WriteError::Schema(_))), "{outcome:?}");
    let client = connected(&fixture.database).await;
    let batch = session::Batch::new("rabbitmq", session_rules());
    let probed = batch.probe(&client, PATIENCE).await;
    assert!(matches!(probed, Err(WriteError::Schema(_))), "{probed:?}");
}
