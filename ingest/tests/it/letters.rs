//! What refused messages may cost: rows and bytes of `dead_letters` in proportion to what was sent.

use bytes::Bytes;
use ingest::batch::Batch as _;
use ingest::deliveries::LETTERS_PER_MESSAGE;
use playground::cluster::Options;

use crate::fixture::{Fixture, message};

/// Letters, and the bytes of their columns.
async fn stored(fixture: &Fixture) -> (i64, i64) {
    let sql = "SELECT count(*), coalesce(sum(octet_length(topic) + octet_length(error) + octet_length(payload)), 0)::bigint \
        FROM dead_letters";
    let row = fixture.db.query_one(sql, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

/// The message that stopped all ingestion: a topic of 60 KB and 20,000 elements that are no readings.
#[tokio::test]
async fn an_array_of_junk_below_a_long_topic_is_a_hundred_letters() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    let junk = format!("[{}]", vec!["0"; 20_000].join(","));
    for topic in [format!("og/field/{}/t/D-1", "S".repeat(60_000)), "og/field/S/turbine/D-1".to_owned()] {
        let mut delivery = message(1, &junk);
        delivery.topic = Bytes::from(topic);
        fixture.push(&mut batch, delivery);
    }
    let good = fixture.delivery(2, 0, "{}");
    fixture.push(&mut batch, good);
    assert_eq!(fixture.commit(&mut batch).await.rows, 1);
    let (letters, bytes) = stored(&fixture).await;
    assert!(letters <= 2 * (LETTERS_PER_MESSAGE as i64 + 1), "{letters}");
    assert!(bytes < 4 * 2 * (junk.len() as i64), "{bytes}");
}

/// More letters than fit into one commit go in transactions of their own, each once.
#[tokio::test]
async fn many_letters_are_committed_in_pieces() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    let junk = "x".repeat(50_000);
    (0..100).for_each(|number| fixture.push(&mut batch, message(number, &junk)));
    let good = fixture.delivery(200, 0, "{}");
    fixture.push(&mut batch, good);
    assert_eq!(fixture.commit(&mut batch).await.rows, 1);
    assert_eq!(stored(&fixture).await.0, 100);
    let transactions = "SELECT count(DISTINCT xmin::text) FROM dead_letters";
    assert!(fixture.count(transactions).await >= 5, "5 MB at about 1 MB each");
    assert_eq!(batch.deliveries_mut().settle().len(), 101);
}

#[tokio::test]
async fn the_payload_of_an_oversize_message_is_cut_and_identified() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    let huge = "y".repeat(3 << 20);
    fixture.push(&mut batch, message(1, &huge));
    fixture.commit(&mut batch).await;
    let sql = "SELECT reason, octet_length(payload), payload_bytes, payload_sha256 = sha256($1::text::bytea) FROM dead_letters";
    let row = fixture.db.query_one(sql, &[&huge]).await.unwrap();
    let of_row: (&str, i32, i64, bool) = (row.get(0), row.get(1), row.get(2), row.get(3));
    assert_eq!(of_row, ("too_large", 1 << 20, 3 << 20, true));
}

/// One device's password is enough for any number of bad messages; they must not fill the disk.
#[tokio::test]
async fn a_device_leaves_so_many_letters_in_an_hour() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut batch = fixture.batch();
    (0..3_000).for_each(|_| fixture.push(&mut batch, message(1, "junk")));
    (0..10).for_each(|_| fixture.push(&mut batch, message(2, "junk")));
    let good = fixture.delivery(1, 0, "{}");
    fixture.push(&mut batch, good);
    assert_eq!(fixture.commit(&mut batch).await.rows, 1);
    assert_eq!(stored(&fixture).await.0, 1_000 + 10);
    assert_eq!(batch.deliveries().suppressed(), 2_000);
    assert_eq!(batch.deliveries().refused(), 3_010, "all are counted");
    assert_eq!(batch.deliveries_mut().settle().len(), 3_011, "and settled");
}

/// A letter must never be what stops the pipeline.
#[tokio::test]
async fn a_letter_whose_text_the_database_refuses_is_stored_escaped() {
    let mut fixture = Fixture::new(Options::alone()).await;
    // As a database would whose encoding lacks the character.
    let sql = "CREATE FUNCTION narrow() RETURNS trigger LANGUAGE plpgsql AS \
        $$ BEGIN IF octet_length(NEW.topic) <> length(NEW.topic) THEN RAISE EXCEPTION 'no such character' \
        USING ERRCODE = '22P05'; END IF; RETURN NEW; END $$; \
        CREATE TRIGGER narrow BEFORE INSERT ON dead_letters FOR EACH ROW EXECUTE FUNCTION narrow()";
    fixture.db.batch_execute(sql).await.unwrap();
    let mut batch = fixture.batch();
    let mut delivery = message(1, "junk");
    delivery.topic = Bytes::from("og/field/S/turbine/Ü-1");
    fixture.push(&mut batch, delivery);
    let good = fixture.delivery(2, 0, "{}");
    fixture.push(&mut batch, good);
    assert_eq!(fixture.commit(&mut batch).await.rows, 1);
    let topic: String = fixture.db.query_one("SELECT topic FROM dead_letters", &[]).await.unwrap().get(0);
    assert_eq!(topic, r"og/field/S/turbine/\u{dc}-1");
}
