//! Two readings of one device with one timestamp: equal is a duplicate, different is never dropped in silence.

use ingest::batch::Batch as _;
use ingest::batch::committed::Committed;
use ingest::settings::SameIdentity;
use ingest::telemetry::Batch;
use playground::cluster::Options;

use crate::fixture::{Fixture, message, reading};

async fn commit(fixture: &mut Fixture, batch: &mut Batch, all: &[(usize, &str)]) -> Committed {
    batch.clear();
    for (number, metrics) in all {
        let delivery = fixture.delivery(*number, 0, metrics);
        fixture.push(batch, delivery);
    }
    fixture.commit(batch).await
}

fn counts(committed: &Committed) -> (usize, usize, usize) {
    (committed.rows, committed.duplicates, committed.joined)
}

async fn conflicts(fixture: &Fixture) -> Vec<String> {
    let sql = "SELECT payload FROM dead_letters WHERE reason = 'conflict' ORDER BY id";
    let rows = fixture.db.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| String::from_utf8(row.get(0)).unwrap()).collect()
}

async fn metrics(fixture: &Fixture, number: usize) -> String {
    let sql = "SELECT metrics::text FROM device_telemetry WHERE device_id = $1";
    fixture.db.query_one(sql, &[&format!("D-{number}")]).await.unwrap().get(0)
}

/// `remembered`: found by the hint, or by the failure of the fast path.
async fn check_conflicts(remembered: bool) {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    let stored = commit(&mut fixture, &mut batch, &[(1, r#"{"rpm":1}"#), (2, r#"{"rpm":1.0}"#)]).await;
    assert_eq!(counts(&stored), (2, 0, 0));
    if !remembered {
        fixture.forget();
    }
    // Equal in another notation, different, and twice different within one batch.
    let all = [
        (1, r#"{"rpm" : 1.00}"#),
        (1, r#"{"rpm":2}"#),
        (2, r#"{"rpm":1,"x":1}"#),
        (3, r#"{"a":1}"#),
        (3, r#"{"a":2}"#),
        (3, r#"{"a":1}"#),
    ];
    let second = commit(&mut fixture, &mut batch, &all).await;
    assert_eq!(counts(&second), (1, 2, 0), "one new row, two equal ones");
    let letters = conflicts(&fixture).await;
    assert_eq!(letters.len(), 3, "{letters:?}");
    for part in [r#""rpm":2"#, r#""x":1"#, r#""a":2"#] {
        assert!(letters.iter().any(|letter| letter.contains(part)), "{part} in {letters:?}");
    }
    assert_eq!(metrics(&fixture, 3).await, r#"{"a": 1}"#, "the first delivery counts");
    assert_eq!(fixture.readings().await, 3);
    let refused = batch.deliveries_mut().settle().iter().filter(|settled| settled.rejected.is_some()).count();
    assert_eq!(refused, 3, "and every message is settled");
}

#[tokio::test]
async fn another_content_is_a_conflict_when_it_is_remembered() {
    check_conflicts(true).await;
}

#[tokio::test]
async fn another_content_is_a_conflict_when_it_is_forgotten() {
    check_conflicts(false).await;
}

/// Every column counts, and an absent one is not the same as an empty one.
#[tokio::test]
async fn every_column_is_compared() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let time = jiff::Timestamp::from_microsecond(fixture.now_us).unwrap();
    let with = |more: &str| {
        let payload = format!(
            r#"{{"device_id":"D-1","device_type":"turbine","site_id":"S","timestamp_utc":"{time}","metrics":{{}}{more}}}"#
        );
        message(1, &payload)
    };
    let mut batch = fixture.batch();
    fixture.push(&mut batch, with(""));
    assert_eq!(fixture.commit(&mut batch).await.rows, 1);
    let others =
        [r#","firmware":"2""#, r#","status":{"state":"OK"}"#, r#","location":{}"#, r#","tags":{"a":"b"}"#];
    for more in others {
        batch.clear();
        fixture.push(&mut batch, with(more));
        assert_eq!(counts(&fixture.commit(&mut batch).await), (0, 0, 0), "{more}");
    }
    assert_eq!(conflicts(&fixture).await.len(), others.len());
}

/// The elements of one array with one timestamp: the one that differs is named, not another.
#[tokio::test]
async fn the_element_that_differs_is_the_dead_letter() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let elements: Vec<String> =
        [r#"{"a":1}"#, r#"{"a":2}"#, r#"{"a":3}"#].map(|metrics| reading(7, fixture.now_us, metrics)).into();
    let mut batch = fixture.batch();
    fixture.push(&mut batch, message(7, &format!("[{}]", elements.join(" , "))));
    assert_eq!(counts(&fixture.commit(&mut batch).await), (1, 0, 0));
    assert_eq!(conflicts(&fixture).await, elements[1..]);
}

#[tokio::test]
async fn what_is_cut_from_a_timestamp_does_not_lose_a_reading() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let time = jiff::Timestamp::from_microsecond(fixture.now_us / 1_000_000 * 1_000_000).unwrap();
    let mut batch = fixture.batch();
    for nanos in ["123456001", "123456002"] {
        let time = time.strftime("%Y-%m-%dT%H:%M:%S");
        let payload = format!(
            r#"{{"device_id":"D-1","device_type":"turbine","site_id":"S","timestamp_utc":"{time}.{nanos}Z","metrics":{{"n":{nanos}}}}}"#
        );
        fixture.push(&mut batch, message(1, &payload));
    }
    assert_eq!(counts(&fixture.commit(&mut batch).await), (1, 0, 0));
    assert_eq!(conflicts(&fixture).await.len(), 1);
}

/// Devices that send each value by itself, with a clock of whole seconds.
#[tokio::test]
async fn metrics_are_joined_when_the_settings_say_so() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch_with(SameIdentity::Merge);
    let all = [
        (1, r#"{"rpm":1}"#),
        (1, r#"{"temp":2}"#),
        (1, r#"{"oil":3,"rpm":1}"#),
        (1, r#"{"rpm":9}"#),
        (2, r#"{"rpm":1}"#),
    ];
    let first = commit(&mut fixture, &mut batch, &all).await;
    assert_eq!(counts(&first), (2, 0, 2));
    assert_eq!(metrics(&fixture, 1).await, r#"{"oil": 3, "rpm": 1, "temp": 2}"#);
    assert_eq!(conflicts(&fixture).await.len(), 1, "rpm is 1 already, and never becomes 9");

    // All of it delivered again, by a broker that did not get the acknowledgements: nothing changes.
    for remembered in [true, false] {
        if !remembered {
            fixture.forget();
        }
        let again = commit(&mut fixture, &mut batch, &[all[0], all[1], all[2], all[4]]).await;
        assert_eq!(counts(&again), (0, 4, 0));
        assert_eq!(metrics(&fixture, 1).await, r#"{"oil": 3, "rpm": 1, "temp": 2}"#);
    }
    // Later, one by one.
    assert_eq!(counts(&commit(&mut fixture, &mut batch, &[(1, r#"{"late":4}"#)]).await), (0, 0, 1));
    assert_eq!(metrics(&fixture, 1).await, r#"{"oil": 3, "rpm": 1, "late": 4, "temp": 2}"#);
    assert_eq!(conflicts(&fixture).await.len(), 1);
}

/// A device must not grow one row without end: each join writes it anew.
#[tokio::test]
async fn joined_rows_have_a_bound() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch_with(SameIdentity::Merge);
    let texts: Vec<String> = (0..200).map(|n| format!(r#"{{"m{n}":"{}"}}"#, noise(n))).collect();
    let all: Vec<(usize, &str)> = texts.iter().map(|text| (1, text.as_str())).collect();
    let committed = commit(&mut fixture, &mut batch, &all).await;
    let letters = conflicts(&fixture).await.len();
    assert_eq!(committed.rows + committed.joined + letters, 200);
    assert!(letters > 0, "{committed:?}");
    assert!(fixture.count("SELECT pg_column_size(metrics)::bigint FROM device_telemetry").await < 64 << 10);
}

/// Text that does not compress.
fn noise(seed: u64) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..1000)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            char::from(b'a' + u8::try_from(state % 26).unwrap())
        })
        .collect()
}
