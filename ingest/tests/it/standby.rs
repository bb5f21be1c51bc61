//! Nothing counts as committed before the standby has it, whatever the server says and whatever the batch holds.

use std::time::Duration;

use ingest::batch::Batch as _;
use ingest::failure::WriteError;
use playground::child::Reach;
use playground::cluster::Options;
use playground::postgres::{Db, Role};
use tokio::time::{Instant, sleep};

use crate::fixture::{Fixture, PATIENCE};

/// The backend whose COMMIT waits for the standby.
pub(crate) async fn waiting(admin: &Db) -> i32 {
    let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'tier0-ingest' AND wait_event = 'SyncRep' \
               ORDER BY query_start DESC LIMIT 1";
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(row) = admin.query_opt(sql, &[]).await.unwrap() {
            return row.get(0);
        }
        assert!(Instant::now() < deadline, "no COMMIT waits for the standby");
        sleep(Duration::from_millis(10)).await;
    }
}

/// The server reports success then, with a warning that the rows are on one machine only.
#[tokio::test]
async fn a_cancelled_wait_for_the_standby_is_not_a_commit() {
    let mut fixture = Fixture::new(Options::default()).await;
    let mut batch = fixture.batch();
    for number in 0..10 {
        let delivery = fixture.delivery(number, 0, "{}");
        fixture.push(&mut batch, delivery);
    }
    batch.seal();
    let admin = fixture.cluster.primary().admin().await.unwrap();
    fixture.cluster.standby_mut().pause(Reach::Tree);
    let cancel = async {
        let pid = waiting(&admin).await;
        let cancelled = admin.query_one("SELECT pg_cancel_backend($1)", &[&pid]).await.unwrap();
        assert!(cancelled.get::<_, bool>(0));
    };
    let (outcome, ()) = tokio::join!(fixture.try_commit(&mut batch, Duration::from_secs(30)), cancel);
    assert!(matches!(outcome, Err(WriteError::Retry(_))), "{outcome:?}");
    // The server's warning comes a moment before the rows can be seen.
    let deadline = Instant::now() + PATIENCE;
    while fixture.readings().await != 10 {
        assert!(Instant::now() < deadline, "they are on the primary, and nowhere else");
        sleep(Duration::from_millis(10)).await;
    }

    fixture.cluster.standby_mut().resume();
    let committed = fixture.try_commit(&mut batch, PATIENCE).await.unwrap();
    assert_eq!((committed.rows, committed.duplicates), (0, 10));
    fixture.cluster.wait_replayed(PATIENCE).await.unwrap();
    let standby = fixture.cluster.standby().connect(Role::Owner).await.unwrap();
    let sql = "SELECT count(*) FROM device_telemetry";
    assert_eq!(standby.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 10);
}

/// Stored before and sent again. A transaction that writes nothing does not wait for the standby by itself; this one
/// must, since its duplicates may be rows of a try that only the primary has.
async fn check_nothing_new(remembered: bool) {
    let mut fixture = Fixture::new(Options::default()).await;
    let mut batch = fixture.batch();
    for round in 0..3 {
        for number in 0..20 {
            if !remembered {
                fixture.forget();
            }
            let delivery = fixture.delivery(number, 0, "{}");
            fixture.push(&mut batch, delivery);
        }
        // Stored, then merged once: the first merge of a connection makes its temporary table, which is a write.
        if round < 2 {
            assert_eq!(fixture.commit(&mut batch).await.rows, if round == 0 { 20 } else { 0 });
            batch.clear();
        }
    }
    batch.seal();
    fixture.cluster.standby_mut().pause(Reach::Tree);
    let outcome = fixture.try_commit(&mut batch, Duration::from_secs(1)).await;
    let Err(WriteError::Retry(reason)) = outcome else { panic!("settled without the standby: {outcome:?}") };
    assert!(reason.contains("no answer"), "{reason}");
    fixture.cluster.standby_mut().resume();
    let committed = fixture.try_commit(&mut batch, PATIENCE).await.unwrap();
    assert_eq!((committed.rows, committed.duplicates), (0, 20));
    assert_eq!(fixture.readings().await, 20);
}

#[tokio::test]
async fn a_batch_of_remembered_duplicates_waits_for_the_standby() {
    check_nothing_new(true).await;
}

#[tokio::test]
async fn a_batch_of_forgotten_duplicates_waits_for_the_standby() {
    check_nothing_new(false).await;
}
