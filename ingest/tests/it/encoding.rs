//! What goes in comes out: the binary COPY encoding read back by Postgres.

use playground::cluster::Options;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Map, Value, json};

use crate::fixture::Fixture;

/// Any JSON value jsonb can hold: numbers at their limits, any text without NUL, nested.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_filter("JSON has no infinities", |f| f.is_finite()).prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(text(), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[^\u{0}]{0,20}",
        Just("\"\\/\u{8}\u{c}\n\r\t\u{1f}\u{7f}".to_owned()),
        Just("日本\u{10ffff}".to_owned())
    ]
}

#[tokio::test]
async fn any_document_is_stored_as_it_was_sent() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        TestRng::from_seed(
            RngAlgorithm::ChaCha,
            b"tier0 copy encoding, fixed seed.."[..32].try_into().unwrap(),
        ),
    );
    let mut documents: Vec<String> = (0..2_000)
        .map(|_| {
            let sample = value().new_tree(&mut runner).unwrap().current();
            json!({ "v": sample }).to_string()
        })
        .collect();
    documents.extend(
        [
            r#"{"v":1e308}"#,
            r#"{"v":-0.0}"#,
            r#"{"v":123456789012345678901234567890.123456789}"#,
            r#"{"v":1.7976931348623157e308}"#,
            r#"{"v":5e-324}"#,
            r#"{"v":"\u00e9\ud83d\ude00\\u0000"}"#,
            r#"{"a":1,"a":2}"#,
            r#"{  "spaces" : [ 1 , 2 ]  }"#,
            "{}",
        ]
        .map(str::to_owned),
    );
    documents.push(format!(r#"{{"deep":{}1{}}}"#, "[".repeat(400), "]".repeat(400)));
    let mut batch = fixture.batch();
    for (number, document) in documents.iter().enumerate() {
        {
            let delivery = fixture.delivery(number, 0, document);
            fixture.push(&mut batch, delivery)
        };
    }
    let committed = fixture.commit(&mut batch).await;
    assert_eq!((committed.rows, committed.duplicates), (documents.len(), 0));
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 0);
    let ids: Vec<String> = (0..documents.len()).map(|number| format!("D-{number}")).collect();
    let different = fixture
        .db
        .query(
            "SELECT sent.id, sent.document FROM unnest($1::text[], $2::text[]) AS sent (id, document) \
             LEFT JOIN device_telemetry t ON t.device_id = sent.id \
             WHERE t.metrics IS DISTINCT FROM sent.document::jsonb",
            &[&ids, &documents],
        )
        .await
        .unwrap();
    let different: Vec<String> = different.iter().map(|row| row.get(1)).collect();
    assert!(different.is_empty(), "{different:?}");
}

#[tokio::test]
async fn every_column_holds_what_the_message_said() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let time = jiff::Timestamp::from_microsecond(fixture.now_us).unwrap();
    let payload = format!(
        r#"{{"device_id":"é\"x","device_type":"pump ü","site_id":"S\\1","timestamp_utc":"{time}","firmware":"3.4.1",
        "metrics":{{"rpm":1}},"status":{{"state":"OK"}},"location":{{"lat":1.5}},"tags":{{"t":"é"}},"unknown":[1]}}"#
    );
    let mut delivery = crate::fixture::message(0, &payload);
    delivery.topic = bytes::Bytes::from("og/field/S\\1/pump ü/é\"x");
    let mut batch = fixture.batch();
    fixture.push(&mut batch, delivery);
    {
        let delivery = fixture.delivery(1, 0, "{}");
        fixture.push(&mut batch, delivery)
    };
    assert_eq!(fixture.commit(&mut batch).await.rows, 2);
    let row = fixture
        .db
        .query_one(
            "SELECT device_id, device_type, site_id, (extract(epoch FROM timestamp_utc) * 1000000)::bigint, firmware, \
             status, location, tags FROM device_telemetry WHERE metrics = '{\"rpm\": 1}'",
            &[],
        )
        .await
        .unwrap();
    let texts: Vec<String> = [0, 1, 2, 4].iter().map(|column| row.get(*column)).collect();
    assert_eq!(texts, ["é\"x", "pump ü", "S\\1", "3.4.1"]);
    assert_eq!(row.get::<_, i64>(3), fixture.now_us);
    let documents: Vec<Value> = [5, 6, 7].iter().map(|column| row.get(*column)).collect();
    assert_eq!(documents, [json!({"state": "OK"}), json!({"lat": 1.5}), json!({"t": "é"})]);
    let nulls = "SELECT count(*) FROM device_telemetry WHERE device_id = 'D-1' AND firmware IS NULL \
                 AND status IS NULL AND location IS NULL AND tags IS NULL";
    assert_eq!(fixture.count(nulls).await, 1);
}

/// A trigger of somebody's leaves its session with another encoding: the next batch must not go through it.
#[tokio::test]
async fn what_a_session_was_left_with_does_not_change_what_is_stored() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let trigger = "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS \
        $$BEGIN PERFORM set_config('client_encoding', 'LATIN1', false); RETURN NEW; END$$; \
        CREATE TRIGGER meddle BEFORE INSERT ON device_telemetry FOR EACH ROW EXECUTE FUNCTION meddle()";
    fixture.db.batch_execute(trigger).await.unwrap();
    for number in 0..3 {
        let mut batch = fixture.batch();
        let delivery = fixture.delivery(number, 0, r#"{"v":"Ü"}"#);
        fixture.push(&mut batch, delivery);
        assert_eq!(fixture.commit(&mut batch).await.rows, 1);
    }
    assert_eq!(fixture.count("SELECT count(*) FROM device_telemetry WHERE metrics->>'v' = 'Ü'").await, 3);
}
