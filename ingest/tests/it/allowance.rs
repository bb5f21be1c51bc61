//! What a device may leave of dead letters: a reading that is refused has its letter however often the commit is tried, and
//! rubbish does not take the place of readings.

use bytesize::ByteSize;
use ingest::batch::Batch as _;
use ingest::batch::committed::Committed;
use ingest::deliveries::LETTERS_PER_MESSAGE;
use ingest::failure::WriteError;
use ingest::settings::IngestSettings;
use ingest::telemetry::Batch;
use playground::cluster::Options;

use crate::fixture::{Fixture, PATIENCE, message, reading};

const LETTERS: &str = "SELECT count(*) FROM dead_letters";

/// Readings of device 1 with one timestamp and other metrics each: all but the first one ever are conflicts.
async fn commit_readings(
    fixture: &mut Fixture,
    batch: &mut Batch,
    numbers: std::ops::Range<usize>,
) -> Committed {
    fill(fixture, batch, numbers);
    fixture.commit(batch).await
}

fn fill(fixture: &mut Fixture, batch: &mut Batch, numbers: std::ops::Range<usize>) {
    batch.clear();
    for number in numbers {
        let delivery = fixture.delivery(1, 0, &format!(r#"{{"n":{number}}}"#));
        fixture.push(batch, delivery);
    }
}

/// A standby that is away, a right that was taken away: the same commit is tried hundreds of times.
#[tokio::test]
async fn commits_that_fail_take_nothing_from_the_allowance() {
    let mut fixture = Fixture::new(Options::alone()).await;
    // Five letters of such a reading.
    fixture.remember(&IngestSettings {
        dead_letters_per_device: 5,
        dead_letter_bytes_per_device: ByteSize::b(2_000),
        ..IngestSettings::default()
    });
    let mut batch = fixture.batch();
    assert_eq!(commit_readings(&mut fixture, &mut batch, 0..1).await.rows, 1);
    let refuse = "CREATE FUNCTION is_full() RETURNS trigger LANGUAGE plpgsql AS \
        $$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END $$; \
        CREATE TRIGGER disk BEFORE INSERT ON dead_letters FOR EACH ROW EXECUTE FUNCTION is_full()";
    fixture.db.batch_execute(refuse).await.unwrap();
    fill(&mut fixture, &mut batch, 1..2);
    batch.seal();
    for _ in 0..20 {
        let outcome = fixture.try_commit(&mut batch, PATIENCE).await;
        assert!(matches!(outcome, Err(WriteError::Retry(_))), "{outcome:?}");
    }
    fixture.db.batch_execute("DROP TRIGGER disk ON dead_letters").await.unwrap();
    fixture.try_commit(&mut batch, PATIENCE).await.unwrap();
    assert_eq!((fixture.count(LETTERS).await, batch.deliveries().suppressed()), (1, 0));
    // As after one commit: four more, and not a fifth.
    commit_readings(&mut fixture, &mut batch, 2..12).await;
    assert_eq!((fixture.count(LETTERS).await, batch.deliveries().suppressed()), (5, 6));
}

/// One array of readings with one timestamp, as large as a message may be.
#[tokio::test]
async fn a_message_whose_readings_the_table_refuses_has_a_hundred_letters() {
    const READINGS: usize = 2_000;
    let mut fixture = Fixture::new(Options::alone()).await;
    let elements: Vec<String> =
        (0..READINGS).map(|n| reading(1, fixture.now_us, &format!(r#"{{"m{n}":{n}}}"#))).collect();
    let whole = format!("[{}]", elements.join(","));
    assert!(whole.len() > 200_000);
    let mut batch = fixture.batch();
    fixture.push(&mut batch, message(1, &whole));
    let committed = fixture.commit(&mut batch).await;
    assert_eq!((committed.rows, committed.duplicates), (1, 0));
    assert_eq!((batch.deliveries().refused(), batch.deliveries().suppressed()), (READINGS - 1, 0));
    let sql = "SELECT payload, error FROM dead_letters ORDER BY id";
    let letters = fixture.db.query(sql, &[]).await.unwrap();
    assert_eq!(letters.len(), LETTERS_PER_MESSAGE + 1);
    for (letter, element) in letters.iter().zip(&elements[1..=LETTERS_PER_MESSAGE]) {
        assert_eq!(letter.get::<_, &[u8]>(0), element.as_bytes());
    }
    let last = letters.last().unwrap();
    assert_eq!(last.get::<_, &[u8]>(0), whole.as_bytes());
    assert!(last.get::<_, &str>(1).contains("as a whole"));
    assert_eq!(batch.deliveries_mut().settle().len(), 1);
}

/// A clock of whole seconds, a clock that is wrong: good readings but for their time, more of them than rubbish is kept.
#[tokio::test]
async fn readings_are_not_rubbish() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    assert_eq!(commit_readings(&mut fixture, &mut batch, 0..1_501).await.rows, 1);
    assert_eq!((fixture.count(LETTERS).await, batch.deliveries().suppressed()), (1_500, 0));
    batch.clear();
    for number in 0..1_500 {
        let delivery = fixture.delivery(2, 86_400_000_000 + number, "{}");
        fixture.push(&mut batch, delivery);
    }
    fixture.commit(&mut batch).await;
    assert_eq!((fixture.count(LETTERS).await, batch.deliveries().suppressed()), (3_000, 0));
}
