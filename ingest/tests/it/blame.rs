//! Whose fault it is that a batch is not stored: a message is blamed only when the database takes everything else, also for the
//! times that the batch is of.

use std::time::Duration;

use ingest::partitions;
use playground::cluster::Options;
use playground::postgres::Role;

use crate::drift::{Writing, letters, trigger, until};
use crate::fixture::{Fixture, connected, layout};

const HOUR: i64 = 3_600_000_000;

/// With a partition of an hour ago, whose name is returned.
async fn with_older_partition(fixture: &mut Fixture) -> String {
    let mut client = connected(&fixture.database).await;
    let cells = layout().cells([fixture.now_us - HOUR].into_iter());
    partitions::ensure(&mut client, &layout(), &cells).await.unwrap();
    drop(client);
    fixture.set_patience(Duration::from_secs(2), Duration::from_secs(1));
    let listing =
        partitions::list(&*connected(&fixture.database).await, partitions::Table::DeviceTelemetry).await;
    listing.unwrap().partitions[0].name.clone()
}

/// Live readings and a late one.
fn send(fixture: &Fixture, writing: &Writing, first: usize) {
    let mut messages: Vec<_> = (first..first + 5).map(|n| fixture.delivery(n, 0, "{}")).collect();
    messages.push(fixture.delivery(first + 5, -HOUR, "{}"));
    writing.send(messages);
}

/// What is stored before anything happens: many live readings, so that the newest rows are none of the older partition.
const BEFORE: usize = 40;

async fn store_before(fixture: &Fixture, writing: &Writing) {
    writing.send((0..BEFORE).map(|n| fixture.delivery(n, 0, "{}")).collect());
    writing.settled(BEFORE).await;
}

/// Six readings were sent that are not stored as long as this lasts.
async fn check_no_letters(fixture: &Fixture, writing: Writing, end: impl Future<Output = ()>) {
    assert!(writing.settlements.try_take().is_none(), "nothing is acknowledged");
    end.await;
    let settled = writing.settled(6).await;
    assert!(settled.iter().all(|settled| settled.rejected.is_none()), "{settled:?}");
    assert_eq!(fixture.readings().await, BEFORE as i64 + 6);
    assert_eq!(letters(fixture).await.len(), 0);
    assert_eq!(writing.metrics.splits.get(), 0);
    writing.end().await;
}

/// As a long CREATE INDEX does, or a transaction that somebody left open.
#[tokio::test]
async fn a_lock_on_an_older_partition_is_no_messages_fault() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let older = with_older_partition(&mut fixture).await;
    let writing = Writing::start(&fixture);
    store_before(&fixture, &writing).await;
    let mut dba = fixture.cluster.connect(Role::Owner).await.unwrap();
    let open = dba.transaction().await.unwrap();
    open.batch_execute(&format!("LOCK TABLE {older} IN SHARE MODE")).await.unwrap();
    send(&fixture, &writing, BEFORE);
    until("many tries", async || writing.metrics.retries.get() >= 10).await;
    check_no_letters(&fixture, writing, async { open.rollback().await.unwrap() }).await;
}

/// The disk of an older partition's tablespace is full, its index is damaged: the newest partition takes everything.
async fn check_older_partition_fails(code: &str) {
    let mut fixture = Fixture::new(Options::alone()).await;
    let older = with_older_partition(&mut fixture).await;
    let writing = Writing::start(&fixture);
    store_before(&fixture, &writing).await;
    let fails = format!(
        "CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN RAISE EXCEPTION 'unusable' USING ERRCODE = '{code}'; END $$; \
         CREATE TRIGGER fails BEFORE INSERT ON {older} FOR EACH ROW EXECUTE FUNCTION fails()"
    );
    fixture.db.batch_execute(&fails).await.unwrap();
    send(&fixture, &writing, BEFORE);
    until("many tries", async || writing.metrics.retries.get() >= 10).await;
    let mend = async { fixture.db.batch_execute("DROP FUNCTION fails() CASCADE").await.unwrap() };
    check_no_letters(&fixture, writing, mend).await;
}

#[tokio::test]
async fn a_full_disk_of_an_older_partition_is_no_messages_fault() {
    check_older_partition_fails("53100").await;
}

#[tokio::test]
async fn a_damaged_index_of_an_older_partition_is_no_messages_fault() {
    check_older_partition_fails("XX002").await;
}

#[tokio::test]
async fn an_error_of_an_older_partition_that_nobody_knows_is_no_messages_fault() {
    check_older_partition_fails("P0001").await;
}

/// Only this device's key leads to the damaged page: what is offered to the table does not meet it.
#[tokio::test]
async fn a_damaged_page_is_no_messages_fault() {
    let fixture = Fixture::new(Options::alone()).await;
    let writing = Writing::start(&fixture);
    store_before(&fixture, &writing).await;
    let body = "IF NEW.device_id = 'D-41' THEN RAISE EXCEPTION 'unexpected zero page' USING ERRCODE = 'XX002'; END IF;";
    trigger(&fixture, body).await;
    send(&fixture, &writing, BEFORE);
    until("the batch is held", async || writing.metrics.held_by_schema.get() > 0).await;
    until("many tries", async || writing.metrics.retries.get() >= 5).await;
    assert_eq!(writing.metrics.held_by_schema.get(), 1);
    let mend = async { fixture.db.batch_execute("DROP FUNCTION interfere() CASCADE").await.unwrap() };
    check_no_letters(&fixture, writing, mend).await;
}

/// The whole server goes down each time, and takes longer to come back than anybody waits for a connection.
#[tokio::test]
async fn a_message_that_crashes_the_server_is_found() {
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.set_patience(Duration::from_millis(100), Duration::from_secs(5));
    let writing = Writing::start(&fixture);
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    // As a bug of the server would: one process that dies takes all others with it.
    let crash = "CREATE FUNCTION crash() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN \
            EXECUTE format('COPY (SELECT 1) TO PROGRAM %L', 'kill -9 ' || pg_backend_pid()); RETURN NEW; END $$; \
        CREATE TRIGGER crash BEFORE INSERT ON device_telemetry FOR EACH ROW WHEN (NEW.device_id = 'D-2') \
            EXECUTE FUNCTION crash()";
    admin.batch_execute(crash).await.unwrap();
    // Alone: each time it is looked for in a larger batch costs some crashes more.
    writing.send(vec![fixture.delivery(2, 0, "{}")]);
    assert!(writing.settled(1).await[0].rejected.is_some());
    writing.send((3..6).map(|n| fixture.delivery(n, 0, "{}")).collect());
    assert!(writing.settled(3).await.iter().all(|settled| settled.rejected.is_none()));
    let admin = fixture.cluster.primary().connect(Role::Admin).await.unwrap();
    let sql = "SELECT (SELECT count(*) FROM device_telemetry), (SELECT count(*) FROM dead_letters)";
    let row = admin.query_one(sql, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (3, 1));
    writing.end().await;
}
