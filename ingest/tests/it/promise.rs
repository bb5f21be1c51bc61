//! The settings on which the promise rests: nothing counts as committed without the standby, whatever is set for the role, and
//! whatever a trigger sets in the middle of our transaction.

use std::time::Duration;

use ingest::batch::Batch as _;
use ingest::database::Database;
use ingest::failure::WriteError;
use ingest::settings::DatabaseSettings;
use playground::child::Reach;
use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role};
use service::health::Health;
use service::secret::Secret;

use crate::fixture::{Fixture, PATIENCE};
use crate::standby::waiting;

fn fresh_sessions(cluster: &Cluster) -> Database {
    let settings = DatabaseSettings {
        hosts: format!("127.0.0.1:{}", cluster.primary().port()),
        password: Secret::new(cluster.primary().passwords().of(Role::Owner)),
        commit_timeout: PATIENCE,
        ..DatabaseSettings::default()
    };
    Database::new(&settings, 2, Health::default().dependency("postgres")).unwrap()
}

/// A trigger of somebody's on the telemetry table that sets this.
fn trigger(name: &str, value: &str, local: bool) -> (String, String) {
    let make = format!(
        "CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS \
         $$BEGIN PERFORM set_config('{name}', '{value}', {local}); RETURN NEW; END$$; \
         CREATE TRIGGER meddle BEFORE INSERT ON public.device_telemetry FOR EACH ROW EXECUTE FUNCTION public.meddle()"
    );
    (make, "DROP FUNCTION public.meddle() CASCADE".into())
}

/// The same at the very end: it fires when everything else of the transaction is done.
fn deferred(name: &str, value: &str) -> (String, String) {
    let make = format!(
        "CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS \
         $$BEGIN PERFORM set_config('{name}', '{value}', true); RETURN NULL; END$$; \
         CREATE CONSTRAINT TRIGGER meddle AFTER INSERT ON public.device_telemetry DEFERRABLE INITIALLY DEFERRED \
         FOR EACH ROW EXECUTE FUNCTION public.meddle()"
    );
    (make, "DROP FUNCTION public.meddle() CASCADE".into())
}

fn of_role(name: &str, value: &str) -> (String, String) {
    (format!("ALTER ROLE tier0 SET {name} = {value}"), format!("ALTER ROLE tier0 RESET {name}"))
}

/// Ten new readings with the standby away. `cancelled`: a DBA cancels the waiting commit, to which the server answers with
/// success and a warning.
async fn is_not_committed_alone(fixture: &mut Fixture, round: usize, cancelled: bool, what: &str) {
    let mut batch = fixture.batch();
    for number in 0..10 {
        let delivery = fixture.delivery(round * 10 + number, 0, "{}");
        fixture.push(&mut batch, delivery);
    }
    batch.seal();
    let admin: Db = fixture.cluster.primary().admin().await.unwrap();
    fixture.cluster.standby_mut().pause(Reach::Tree);
    let patience = if cancelled { Duration::from_secs(30) } else { Duration::from_secs(1) };
    let cancel = async {
        if cancelled {
            let pid = waiting(&admin).await;
            admin.query_one("SELECT pg_cancel_backend($1)", &[&pid]).await.unwrap();
        }
    };
    let (outcome, ()) = tokio::join!(fixture.try_commit(&mut batch, patience), cancel);
    fixture.cluster.standby_mut().resume();
    assert!(matches!(outcome, Err(WriteError::Retry(_))), "{what}: {outcome:?}");
    let committed = fixture.try_commit(&mut batch, PATIENCE * 4).await.unwrap();
    assert_eq!(committed.rows + committed.duplicates, 10, "{what}");
}

#[tokio::test]
async fn a_commit_waits_for_the_standby_whatever_role_and_triggers_set() {
    let mut fixture = Fixture::new(Options::default()).await;
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    let acts = [
        of_role("synchronous_commit", "off"),
        of_role("synchronous_commit", "local"),
        of_role("synchronous_commit", "remote_write"),
        trigger("synchronous_commit", "off", true),
        trigger("synchronous_commit", "local", false),
        deferred("synchronous_commit", "off"),
    ];
    for (round, (act, undo)) in acts.iter().enumerate() {
        admin.batch_execute(act).await.unwrap();
        fixture.database = fresh_sessions(&fixture.cluster);
        is_not_committed_alone(&mut fixture, round, false, act).await;
        admin.batch_execute(undo).await.unwrap();
    }
    assert_eq!(fixture.readings().await, 60);
}

#[tokio::test]
async fn a_cancelled_wait_is_told_whatever_role_and_triggers_set() {
    let mut fixture = Fixture::new(Options::default()).await;
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    let acts = [
        of_role("client_min_messages", "error"),
        trigger("client_min_messages", "error", true),
        trigger("client_min_messages", "error", false),
        deferred("client_min_messages", "error"),
    ];
    for (round, (act, undo)) in acts.iter().enumerate() {
        admin.batch_execute(act).await.unwrap();
        fixture.database = fresh_sessions(&fixture.cluster);
        is_not_committed_alone(&mut fixture, round, true, act).await;
        admin.batch_execute(undo).await.unwrap();
    }
    assert_eq!(fixture.readings().await, 40);
}

/// A statement timeout of milliseconds on the role, and batches that take far longer: all of them are stored, none is tried again.
#[tokio::test]
async fn a_statement_timeout_of_the_role_does_not_reach_a_batch() {
    let mut fixture = Fixture::new(Options::default()).await;
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    for sql in
        ["ALTER ROLE tier0 SET statement_timeout = '2ms'", "ALTER DATABASE tier0_db SET lock_timeout = '1ms'"]
    {
        admin.batch_execute(sql).await.unwrap();
    }
    fixture.database = fresh_sessions(&fixture.cluster);
    let metrics = format!(r#"{{"series":[{}1]}}"#, "0.123456789,".repeat(100));
    for round in 0..4 {
        let mut batch = fixture.batch();
        for number in 0..5_000 {
            let delivery = fixture.delivery(number, round, &metrics);
            fixture.push(&mut batch, delivery);
        }
        batch.seal();
        let started = std::time::Instant::now();
        let committed = fixture.try_commit(&mut batch, PATIENCE * 4).await.unwrap();
        assert_eq!(committed.rows, 5_000);
        assert!(started.elapsed() > Duration::from_millis(2), "a batch takes longer than the timeout");
    }
    assert_eq!(fixture.count("SELECT count(*) FROM public.device_telemetry").await, 20_000);
}
