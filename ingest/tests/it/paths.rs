//! Fast path, merge, isolation: every reading is one row or one dead letter, and the rest is not harmed.

use std::time::{Duration, Instant};

use ingest::batch::Batch as _;
use ingest::batch::committed::Committed;
use ingest::dead_letter::Reason;
use playground::cluster::Options;

use crate::fixture::{Fixture, message, reading};

fn counts(committed: &Committed) -> (usize, usize) {
    (committed.rows, committed.duplicates)
}

/// Stored before, then sent again among new ones, twice in the batch too. `remembered`: found by the hint, or by the
/// failure of the fast path.
async fn check_duplicates(remembered: bool) {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    for number in 0..100 {
        let delivery = fixture.delivery(number, 0, r#"{"rpm":1}"#);
        fixture.push(&mut batch, delivery);
    }
    assert_eq!(counts(&fixture.commit(&mut batch).await), (100, 0));

    batch.clear();
    for number in (50..150).chain([149]) {
        if !remembered {
            fixture.forget();
        }
        let delivery = fixture.delivery(number, 0, r#"{"rpm":1.0}"#);
        fixture.push(&mut batch, delivery);
    }
    assert_eq!(counts(&fixture.commit(&mut batch).await), (50, 51), "50 stored before, 1 twice in the batch");
    assert_eq!(fixture.readings().await, 150);
    let settled = batch.deliveries_mut().settle();
    assert_eq!(settled.len(), 101);
    assert!(settled.iter().all(|settled| settled.rejected.is_none()));
}

#[tokio::test]
async fn the_same_reading_twice_is_one_row_when_it_is_remembered() {
    check_duplicates(true).await;
}

#[tokio::test]
async fn the_same_reading_twice_is_one_row_when_it_is_forgotten() {
    check_duplicates(false).await;
}

/// What the decoder takes and only the database refuses, by a rule somebody added ([`Fixture::refuse_poison`]).
const POISON: &str = r#"{"poison":1}"#;

#[tokio::test]
async fn rows_the_database_refuses_cost_only_themselves() {
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.refuse_poison().await;
    let mut batch = fixture.batch();
    for number in 0..1000 {
        let poison = matches!(number, 0 | 17 | 18 | 500 | 999);
        {
            let delivery = fixture.delivery(number, 0, if poison { POISON } else { "{}" });
            fixture.push(&mut batch, delivery)
        };
    }
    fixture.push(&mut batch, message(1000, "not json"));
    assert_eq!(counts(&fixture.commit(&mut batch).await), (995, 0));
    assert_eq!(fixture.readings().await, 995);
    let letters = fixture
        .db
        .query("SELECT topic, reason, error, payload, source FROM dead_letters ORDER BY topic", &[])
        .await
        .unwrap();
    let topics: Vec<String> = letters.iter().map(|row| row.get(0)).collect();
    let expected = [0, 1000, 17, 18, 500, 999].map(|n| format!("og/field/S/turbine/D-{n}"));
    assert_eq!(topics, expected);
    for row in &letters {
        let (reason, error, payload): (&str, &str, &[u8]) = (row.get(1), row.get(2), row.get(3));
        if payload == b"not json" {
            assert_eq!(reason, "not_json");
        } else {
            assert_eq!(reason, "rejected_by_database");
            assert!(error.contains("22003"), "{error}");
            assert!(String::from_utf8_lossy(payload).contains("poison"));
        }
        assert_eq!(row.get::<_, &str>(4), "mqtt");
    }
    let rejected: Vec<u64> = batch
        .deliveries_mut()
        .settle()
        .into_iter()
        .filter(|s| s.rejected.is_some())
        .map(|s| s.ack.id)
        .collect();
    assert_eq!(rejected, [0, 17, 18, 500, 999, 1000]);
}

/// Each refused row takes a few steps. The deadline is for a step: for all of them together it would never be met, and
/// the batch would begin again for ever.
#[tokio::test]
async fn many_refused_rows_do_not_run_into_the_commit_timeout() {
    const ROWS: usize = 1_200;
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.refuse_poison().await;
    const RESERVE: Duration = Duration::from_secs(60);
    let (mut patience, mut shown) = (RESERVE, false);
    // Each time shows how long this takes on this machine now. A batch that takes longer than its patience shows it; with a
    // deadline for all rows together none ever would.
    let mut rounds = 0;
    while !shown {
        assert!(rounds < 10, "never longer than its patience");
        let mut batch = fixture.batch();
        for number in 0..ROWS {
            let metrics = if number % 3 == 0 { POISON } else { "{}" };
            let delivery = fixture.delivery(rounds * ROWS + number, 0, metrics);
            fixture.push(&mut batch, delivery);
        }
        batch.seal();
        let started = Instant::now();
        match fixture.try_commit(&mut batch, patience).await {
            Ok(committed) => {
                assert_eq!(counts(&committed), (ROWS * 2 / 3, 0));
                shown = started.elapsed() > patience;
                patience = started.elapsed() / 4;
            }
            // One step took that long: the machine was busy elsewhere. If it was the COMMIT, all is stored already.
            Err(_) => {
                let (rows, duplicates) = counts(&fixture.try_commit(&mut batch, RESERVE).await.unwrap());
                assert_eq!(rows + duplicates, ROWS * 2 / 3);
            }
        }
        rounds += 1;
    }
    assert_eq!(
        fixture.count("SELECT count(DISTINCT topic) FROM dead_letters").await,
        (ROWS / 3 * rounds) as i64
    );
}

#[tokio::test]
async fn a_batch_of_nothing_but_poison_and_duplicates_ends() {
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.refuse_poison().await;
    let mut batch = fixture.batch();
    (0..40).for_each(|n| {
        let delivery = fixture.delivery(n, 0, "{}");
        fixture.push(&mut batch, delivery)
    });
    fixture.commit(&mut batch).await;
    batch.clear();
    for number in 0..80 {
        let metrics = if number % 2 == 0 { "{}" } else { POISON };
        {
            let delivery = fixture.delivery(number, 0, metrics);
            fixture.push(&mut batch, delivery)
        };
    }
    assert_eq!(counts(&fixture.commit(&mut batch).await), (20, 20));
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 40);
    let reasons: Vec<Reason> = batch.deliveries().reasons().collect();
    assert_eq!(reasons, [Reason::RejectedByDatabase; 40]);
}

#[tokio::test]
async fn a_refused_element_of_an_array_is_named_alone() {
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.refuse_poison().await;
    let elements: Vec<String> = (0..10)
        .map(|n| match n {
            2 => "17".to_owned(),
            5 => reading(7, fixture.now_us + n, POISON),
            _ => reading(7, fixture.now_us + n, "{}"),
        })
        .collect();
    let mut batch = fixture.batch();
    fixture.push(&mut batch, message(7, &format!("[{}]", elements.join(","))));
    {
        let delivery = fixture.delivery(8, 0, "{}");
        fixture.push(&mut batch, delivery)
    };
    assert_eq!(counts(&fixture.commit(&mut batch).await), (9, 0));
    let letters =
        fixture.db.query("SELECT payload FROM dead_letters ORDER BY length(payload)", &[]).await.unwrap();
    let payloads: Vec<String> =
        letters.iter().map(|row| String::from_utf8(row.get::<_, Vec<u8>>(0)).unwrap()).collect();
    assert_eq!(payloads, ["17".to_owned(), elements[5].clone()]);
    let settled = batch.deliveries_mut().settle();
    assert_eq!(settled.iter().map(|s| s.rejected.is_some()).collect::<Vec<_>>(), [true, false]);
}

#[tokio::test]
async fn a_late_reading_gets_its_partition() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let hour = 3_600_000_000;
    let mut batch = fixture.batch();
    {
        let delivery = fixture.delivery(1, -5 * hour, "{}");
        fixture.push(&mut batch, delivery)
    };
    {
        let delivery = fixture.delivery(1, 0, "{}");
        fixture.push(&mut batch, delivery)
    };
    {
        let delivery = fixture.delivery(1, -25 * hour, "{}");
        fixture.push(&mut batch, delivery)
    };
    {
        let delivery = fixture.delivery(1, hour, "{}");
        fixture.push(&mut batch, delivery)
    };
    assert_eq!(counts(&fixture.commit(&mut batch).await), (2, 0));
    let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'device_telemetry'::regclass";
    assert_eq!(fixture.count(partitions).await, 2, "one for now, one for the late reading, none in between");
    let out = "SELECT count(*) FROM dead_letters WHERE reason = 'timestamp_out_of_range'";
    assert_eq!(fixture.count(out).await, 2);
}
