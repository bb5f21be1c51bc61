//! Rows at fault are found at a cost in proportion to the batch, also those that no partition takes.

use ingest::batch::Batch as _;
use playground::cluster::Options;

use crate::drift::Writing;
use crate::fixture::Fixture;

#[tokio::test]
async fn a_rule_that_refuses_half_of_the_rows_sends_the_batch_a_few_times() {
    const ROWS: usize = 600;
    let (mut fixture, proxy) = Fixture::behind_aborting_proxy(Options::alone()).await;
    let rule = "ALTER TABLE device_telemetry ADD CONSTRAINT even CHECK ((metrics ->> 'n')::int % 2 = 0)";
    fixture.db.batch_execute(rule).await.unwrap();
    let mut batch = fixture.batch();
    for number in 0..ROWS {
        let delivery = fixture.delivery(number, 0, &format!(r#"{{"n":{number}}}"#));
        fixture.push(&mut batch, delivery);
    }
    let bytes = batch.bytes();
    let before = proxy.bytes_sent();
    assert_eq!(fixture.commit(&mut batch).await.rows, ROWS / 2);
    let sent = proxy.bytes_sent() - before;
    assert!(sent < 30 * bytes, "{bytes} bytes of rows, {sent} sent");
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, (ROWS / 2) as i64);
}

/// Somebody has partitioned a partition once more, and there is no place in it for some devices.
#[tokio::test]
async fn a_row_that_no_partition_takes_costs_only_itself() {
    let fixture = Fixture::new(Options::alone()).await;
    let partition = "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid \
        WHERE i.inhparent = 'device_telemetry'::regclass";
    let row = fixture.db.query_one(partition, &[]).await.unwrap();
    let (name, bound): (&str, &str) = (row.get(0), row.get(1));
    let devices: Vec<String> = (0..10).map(|n| format!("'D-{n}'")).collect();
    let change = format!(
        "ALTER TABLE device_telemetry DETACH PARTITION {name}; ALTER TABLE {name} RENAME TO before; \
         CREATE TABLE {name} (LIKE device_telemetry) PARTITION BY LIST (device_id); \
         CREATE TABLE some_devices PARTITION OF {name} FOR VALUES IN ({}); \
         ALTER TABLE device_telemetry ATTACH PARTITION {name} {bound}",
        devices.join(",")
    );
    fixture.db.batch_execute(&change).await.unwrap();
    let writing = Writing::start(&fixture);
    writing.send((0..13).map(|n| fixture.delivery(n, 0, "{}")).collect());
    let settled = writing.settled(13).await;
    let refused: Vec<u64> =
        settled.iter().filter(|settled| settled.rejected.is_some()).map(|settled| settled.ack.id).collect();
    assert_eq!(refused, [10, 11, 12]);
    assert_eq!(fixture.readings().await, 10);
    let sql = "SELECT count(*) FROM dead_letters WHERE reason = 'rejected_by_database' AND error LIKE '%partition%'";
    assert_eq!(fixture.count(sql).await, 3);
    writing.end().await;
}
