//! The verification finds what is wrong in real tables, on the node where it is wrong.

use std::time::Duration;

use jiff::Timestamp;
use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role};
use playground::scratch::Scratch;
use tier0::verify::stored::{Scope, next_transaction, read};
use tier0::verify::{Findings, compare};
use wire::ledger::Ledger;

/// As the contract has them, partitioned, so that the plans are those of the product.
const TABLES: &str = "
    CREATE TABLE device_telemetry (device_id text COLLATE \"C\" NOT NULL, timestamp_utc timestamptz NOT NULL,
        metrics jsonb NOT NULL, PRIMARY KEY (timestamp_utc, device_id)) PARTITION BY RANGE (timestamp_utc);
    CREATE TABLE early PARTITION OF device_telemetry FOR VALUES FROM ('2020-01-01') TO ('2026-02-03 04:05:06Z');
    CREATE TABLE late PARTITION OF device_telemetry FOR VALUES FROM ('2026-02-03 04:05:06Z') TO ('2030-01-01');
    CREATE TABLE dead_letters (received_at timestamptz NOT NULL, reason text NOT NULL, source text DEFAULT 'mqtt');";

/// 2026-02-03T04:05:00Z
const START: i64 = 1_770_091_500_000_000;

/// 40 devices, 50 readings each, odd microseconds, across both partitions; two dead letters.
async fn fill(db: &Db) -> Ledger {
    db.batch_execute(TABLES).await.unwrap();
    publish(db).await
}

async fn publish(db: &Db) -> Ledger {
    let mut ledger = Ledger { complete: true, qos: 1, started_us: START, ..Ledger::default() };
    let (mut ids, mut times) = (Vec::new(), Vec::new());
    for device in 0..40_i64 {
        for n in 0..50_i64 {
            let us = START + n * 200_000 + device * 7_919 + n * 31;
            let id = format!("TURB-{device:05}");
            ledger.devices.entry(id.clone()).or_default().add(us);
            ids.push(id);
            times.push(Timestamp::from_microsecond(us).unwrap());
        }
    }
    ledger.acknowledged = 2002;
    ledger.dead_letters.insert("not_json".into(), 2);
    db.execute(
        "INSERT INTO device_telemetry SELECT id, at, '{}' FROM unnest($1::text[], $2::timestamptz[]) AS r (id, at)",
        &[&ids, &times],
    )
    .await
    .unwrap();
    db.batch_execute("INSERT INTO dead_letters SELECT now(), 'not_json' FROM generate_series(1, 2)")
        .await
        .unwrap();
    ledger
}

async fn look(db: &mut Db, ledger: &Ledger, scope: Scope) -> Findings {
    compare("region1", ledger, &read(db, ledger, scope).await.unwrap())
}

#[tokio::test]
async fn finds_a_missing_an_extra_and_a_changed_row_and_nothing_else() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let mut db = cluster.connect(Role::Owner).await.unwrap();
    let ledger = fill(&db).await;
    let exact = look(&mut db, &ledger, Scope::Everything).await;
    assert_eq!((exact.verdict().as_str(), exact.rows, exact.distinct), ("exact", 2000, 2000));

    for (change, verdict) in [
        (
            "DELETE FROM device_telemetry WHERE device_id = 'TURB-00007' AND timestamp_utc = (SELECT min(timestamp_utc) FROM device_telemetry WHERE device_id = 'TURB-00007')",
            "lost 1",
        ),
        (
            "INSERT INTO device_telemetry VALUES ('TURB-00007', '2026-02-03 04:05:03.141592Z', '{}')",
            "extra 1",
        ),
        ("INSERT INTO device_telemetry VALUES ('ghost', '2020-02-03 04:05:03Z', '{}')", "extra 1"),
        (
            "UPDATE device_telemetry SET timestamp_utc = timestamp_utc + interval '1 microsecond' WHERE (device_id, timestamp_utc) = (SELECT device_id, timestamp_utc FROM device_telemetry ORDER BY timestamp_utc OFFSET 900 LIMIT 1)",
            "1 devices altered",
        ),
        ("DELETE FROM dead_letters WHERE ctid = (SELECT min(ctid) FROM dead_letters)", "1 dead letters lost"),
        ("INSERT INTO dead_letters VALUES (now(), 'wrong_type')", "1 dead letters extra"),
    ] {
        db.batch_execute(&format!("BEGIN; {change}; COMMIT")).await.unwrap();
        let found = look(&mut db, &ledger, Scope::Everything).await;
        assert_eq!(found.verdict(), verdict, "after {change}");
        assert!(!found.holds());
        // Back to where it was, for the next change.
        db.batch_execute("DROP TABLE device_telemetry, dead_letters").await.unwrap();
        fill(&db).await;
    }
}

#[tokio::test]
async fn readings_in_doubt_may_be_stored_or_not() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let mut db = cluster.connect(Role::Owner).await.unwrap();
    let mut ledger = fill(&db).await;
    // One stored (as the device's very last, so that its last timestamp moves), one not.
    let (stored, absent) = (START + 20_000_001, START + 20_000_002);
    ledger.unknown = vec![("TURB-00003".into(), stored), ("TURB-00004".into(), absent)];
    db.execute(
        "INSERT INTO device_telemetry VALUES ('TURB-00003', $1, '{}')",
        &[&Timestamp::from_microsecond(stored).unwrap()],
    )
    .await
    .unwrap();
    for scope in [Scope::Everything, Scope::Run { first_transaction: 3 }] {
        let found = look(&mut db, &ledger, scope).await;
        assert_eq!(
            (found.verdict().as_str(), found.rows, found.unacknowledged),
            ("exact", 2001, 1),
            "{scope:?}"
        );
    }
    ledger.unknown.remove(0);
    assert_eq!(look(&mut db, &ledger, Scope::Everything).await.verdict(), "extra 1");
}

#[tokio::test]
async fn an_earlier_run_is_out_of_scope() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let mut db = cluster.connect(Role::Owner).await.unwrap();
    // One reading in the span of time of the run to come, one before; the broker delivers a third one late.
    db.batch_execute(TABLES).await.unwrap();
    db.batch_execute(
        "INSERT INTO device_telemetry VALUES ('TURB-00001', '2026-02-03 03:00Z', '{}'),
                                             ('TURB-00001', '2026-02-03 04:05:03.271828Z', '{}');
         INSERT INTO dead_letters VALUES ('2026-02-03 03:00Z', 'not_json')",
    )
    .await
    .unwrap();
    let first_transaction = next_transaction(&db).await.unwrap();
    let ledger = publish(&db).await;
    db.batch_execute("INSERT INTO device_telemetry VALUES ('TURB-00002', '2026-02-03 03:00Z', '{}')")
        .await
        .unwrap();
    let run = look(&mut db, &ledger, Scope::Run { first_transaction }).await;
    assert_eq!((run.verdict().as_str(), run.rows, run.distinct), ("exact", 2000, 2000));
    assert_eq!(look(&mut db, &ledger, Scope::Everything).await.verdict(), "extra 3, 1 dead letters extra");
}

/// A run longer than the retention: the partition of its first seconds is dropped.
#[tokio::test]
async fn what_the_retention_dropped_is_not_called_lost() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let mut db = cluster.connect(Role::Owner).await.unwrap();
    let ledger = fill(&db).await;
    let dropped: i64 = db.query_one("SELECT count(*) FROM early", &[]).await.unwrap().get(0);
    db.batch_execute("DROP TABLE early").await.unwrap();
    let stored = read(&mut db, &ledger, Scope::Everything).await.unwrap();
    assert_eq!(compare("region1", &ledger, &stored).verdict(), format!("lost {dropped}"));
    let now = Timestamp::now().as_microsecond();
    let since = |us: i64| Some(Duration::from_micros(u64::try_from(now - us).unwrap()));
    let found = compare("region1", &ledger, &stored.clone().within(since(START + 6_000_000)));
    assert_eq!(found.verdict(), format!("nothing wrong; {dropped} outside the retention, not checked"));
    assert!(found.holds());
    // A retention that reaches back before the run explains nothing.
    let found = compare("region1", &ledger, &stored.within(since(START - 3_600_000_000)));
    assert_eq!(found.verdict(), format!("lost {dropped}"));
}

/// The fast way to microseconds that the scan uses, against the exact one.
#[tokio::test]
async fn every_microsecond_survives_the_scan() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let db = cluster.connect(Role::Owner).await.unwrap();
    let wrong: i64 = db
        .query_one(
            "SELECT count(*) FROM (SELECT '2026-01-01Z'::timestamptz + (i::bigint * 100000007) * interval '1 microsecond' \
             AS t FROM generate_series(0, 2000000) AS i) AS x \
             WHERE (date_part('epoch', t) * 1000000)::bigint <> (extract(epoch FROM t) * 1000000)::bigint",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(wrong, 0);
}
