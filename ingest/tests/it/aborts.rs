//! A transaction that the server aborts in the tail of a COPY is not committed, and is not taken for committed.

use ingest::batch::committed::Committed;
use ingest::batch::{Batch as _, Path};
use ingest::failure::WriteError;
use ingest::session;
use ingest::settings::IngestSettings;
use ingest::telemetry::Batch;
use playground::cluster::Options;

use crate::aborting_proxy::AbortingProxy;
use crate::fixture::{Fixture, PATIENCE, connected, message, session_event, session_rules};

/// Tries as a writer does until it is committed; fails on the first outcome that is taken for a commit although COPYs are
/// still aborted. Returns what was committed and how many tries failed.
async fn commit_at_last<B: ingest::batch::Batch>(
    fixture: &Fixture,
    proxy: &AbortingProxy,
    batch: &mut B,
    mut path: Path,
) -> (Committed, usize) {
    batch.seal();
    let mut failed = 0;
    loop {
        let mut client = connected(&fixture.database).await;
        match batch.commit(&mut client, path, PATIENCE).await {
            Ok(committed) => {
                assert!(proxy.is_done(), "taken for committed: {committed:?}");
                return (committed, failed);
            }
            Err(WriteError::Duplicate) => path = Path::Merge,
            Err(error) => {
                assert!(matches!(error, WriteError::Retry(_) | WriteError::Data { .. }), "{error:?}");
                if !error.keeps_connection() {
                    fixture.database.discard(client, "aborted");
                }
                failed += 1;
            }
        }
        assert!(failed < 20, "never committed");
    }
}

fn readings(fixture: &mut Fixture, batch: &mut Batch, numbers: std::ops::Range<usize>) {
    for number in numbers {
        let delivery = fixture.delivery(number, 0, r#"{"rpm":1}"#);
        fixture.push(batch, delivery);
    }
}

#[tokio::test]
async fn an_aborted_copy_is_not_a_commit() {
    let (mut fixture, proxy) = Fixture::behind_aborting_proxy(Options::alone()).await;
    // Nothing but new readings: COMMIT leaves with the end of the COPY.
    let mut batch = fixture.batch();
    readings(&mut fixture, &mut batch, 0..50);
    proxy.abort_copies(3);
    let (committed, failed) = commit_at_last(&fixture, &proxy, &mut batch, Path::Fast).await;
    assert_eq!((committed.rows, failed), (50, 3));
    assert_eq!(fixture.readings().await, 50);

    // With a dead letter and a reading seen lately.
    batch.clear();
    readings(&mut fixture, &mut batch, 49..60);
    fixture.push(&mut batch, message(7, "not json"));
    proxy.abort_copies(2);
    let (committed, failed) = commit_at_last(&fixture, &proxy, &mut batch, Path::Fast).await;
    assert_eq!((committed.rows, committed.duplicates, failed), (10, 1, 2));
    assert_eq!(fixture.readings().await, 60);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 1);

    // The careful ways.
    for (path, numbers, rows) in [(Path::Merge, 55..70, 10), (Path::Isolate, 70..80, 10)] {
        batch.clear();
        fixture.forget();
        readings(&mut fixture, &mut batch, numbers);
        proxy.abort_copies(1);
        let (committed, failed) = commit_at_last(&fixture, &proxy, &mut batch, path).await;
        assert_eq!((committed.rows, failed), (rows, 1), "{path:?}");
    }
    assert_eq!(fixture.readings().await, 80);
}

#[tokio::test]
async fn an_aborted_copy_of_sessions_is_not_a_commit() {
    let (fixture, proxy) = Fixture::behind_aborting_proxy(Options::alone()).await;
    for (path, session) in [(Path::Fast, "s-1"), (Path::Isolate, "s-2")] {
        let mut batch = session::Batch::new("rabbitmq", session_rules());
        batch.push(
            session_event(session),
            fixture.now_us,
            &mut session::Batch::memory(&IngestSettings::default()),
        );
        proxy.abort_copies(2);
        let refused: Vec<&str> =
            batch.deliveries().letters().iter().map(|letter| letter.error.as_str()).collect();
        assert!(refused.is_empty(), "{refused:?}");
        let (committed, failed) = commit_at_last(&fixture, &proxy, &mut batch, path).await;
        assert_eq!((committed.rows, failed), (1, 2), "{path:?}");
    }
    assert_eq!(fixture.count("SELECT count(*) FROM user_sessions").await, 2);
}

/// A transaction that is idle in between, or whose work fails, must not be reported as committed either.
#[tokio::test]
async fn a_failed_transaction_does_not_commit() {
    let fixture = Fixture::new(Options::alone()).await;
    let client = connected(&fixture.database).await;
    client.batch_execute("BEGIN").await.unwrap();
    client.batch_execute("CREATE TABLE kept_not (n int)").await.unwrap();
    client.batch_execute("SELECT 1/0").await.unwrap_err();
    let error = ingest::transaction::commit(&client).await.unwrap_err();
    assert!(matches!(error, WriteError::Retry(_)), "{error:?}");
    ingest::transaction::roll_back(&client).await.unwrap();
    assert_eq!(fixture.count("SELECT count(*) FROM pg_class WHERE relname = 'kept_not'").await, 0);

    // Nor does one that is not there.
    assert!(ingest::transaction::commit(&client).await.is_err());

    client.batch_execute("BEGIN; CREATE TABLE kept (n int)").await.unwrap();
    ingest::transaction::commit(&client).await.unwrap();
    assert_eq!(fixture.count("SELECT count(*) FROM pg_class WHERE relname = 'kept'").await, 1);
    // Committed, and the session is out of the transaction.
    tokio::time::timeout(PATIENCE, client.batch_execute("VACUUM kept")).await.unwrap().unwrap();
}
