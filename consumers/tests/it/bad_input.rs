//! Whatever a device sends ends as a row or as a dead letter with its reason, and the consumer goes on.

use std::collections::BTreeMap;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use playground::cluster::Options;

use crate::floor::{Floor, READINGS, reading, topic, until_metric};

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn bad_input_ends_as_a_row_or_a_dead_letter_and_the_rest_is_stored() {
    let floor = Floor::new(Options::alone(), |launch| launch).await;
    let now = jiff::Timestamp::now().to_string();
    let with = |number: usize, from: &str, to: &str| reading(number, &now).replace(from, to);
    let long_id = "X".repeat(10_000);
    let bad: Vec<(&str, String, Vec<u8>)> = vec![
        ("not_json", topic(0), vec![0xff, 0x00, 0x80]),
        ("not_json", topic(0), with(0, "}", "").into()),
        ("too_large", topic(0), vec![b'x'; 10 << 20]),
        ("missing_field", topic(0), with(0, r#""site_id":"S","#, "").into()),
        ("wrong_type", topic(0), with(0, r#"{"rpm":0}"#, "[0]").into()),
        ("wrong_type", topic(0), with(0, &now, "yesterday").into()),
        ("wrong_type", topic(0), b"[17]".to_vec()),
        ("topic_mismatch", topic(1), reading(0, &now).into()),
        ("topic_mismatch", "og/field/short".into(), reading(0, &now).into()),
        ("topic_mismatch", format!("og/field/S/turbine/{long_id}"), with(0, "D-0", &long_id).into()),
        ("too_large", topic(0), with(0, "D-0", &long_id).into()),
        ("timestamp_out_of_range", topic(0), reading(0, "1970-01-01T00:00:00Z").into()),
        ("timestamp_out_of_range", topic(0), reading(0, "2099-01-01T00:00:00Z").into()),
        ("rejected_by_database", topic(0), with(0, "rpm", "r\\u0000pm").into()),
        ("rejected_by_database", topic(0), with(0, ":0}", ":1e999999}").into()),
        ("rejected_by_database", topic(0), with(0, ":0}", ":1e400}").into()),
        ("rejected_by_database", topic(0), with(0, ":0}", ":\"\\ud800\"}").into()),
        ("rejected_by_database", topic(0), {
            let deep = format!(":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
            with(0, ":0}", &deep).into()
        }),
    ];
    let good: Vec<Vec<u8>> = vec![
        with(100, ":100}", ":1e308}").into(),
        with(101, ":101}", ":1,\"rpm\":2}").into(),
        with(102, ":102}", &format!(":{}{}}}", "[".repeat(1000), "]".repeat(1000))).into(),
        with(103, ":103}", ":\"日本 \\ud83d\\ude00\"}").into(),
    ];
    let mut publisher = floor.publisher();
    let messages = 99 + bad.len() + good.len() + 3;
    publisher.publish_readings(1, 50);
    for (_, topic, payload) in &bad {
        publisher.publish(topic, payload.clone());
    }
    for (number, payload) in good.iter().enumerate() {
        publisher.publish(&topic(100 + number), payload.clone());
    }
    publisher.publish_readings(50, 100);
    // What is taken though it is odd: a cleared topic, an array in gzip, NUL bytes at the end.
    publisher.publish(&topic(0), vec![]);
    let later = (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1)).to_string();
    publisher.publish(&topic(200), gzip(&format!("[{},{}]", reading(200, &now), reading(200, &later))));
    publisher.publish(&topic(201), format!("{}\0\0", reading(201, &now)));
    publisher.accepted().await;
    floor.until("SELECT count(*) FROM dead_letters", bad.len() as i64).await;
    floor.until(READINGS, 99 + 3 + good.len() as i64).await;

    let mut expected: BTreeMap<String, usize> = BTreeMap::new();
    bad.iter().for_each(|(reason, ..)| *expected.entry((*reason).to_owned()).or_default() += 1);
    let db = floor.db().await;
    let rows = db.query("SELECT reason, topic, payload, error FROM dead_letters", &[]).await.unwrap();
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    for row in &rows {
        let (reason, topic, payload): (String, String, Vec<u8>) = (row.get(0), row.get(1), row.get(2));
        // Of a message above ingest.max_payload so much is kept.
        let is_cut_of = |whole: &[u8]| payload.len() == 256 << 10 && whole.starts_with(&payload);
        assert!(
            bad.iter().any(|(r, t, p)| *r == reason
                && (*t == topic || t.len() > 800 && t.get(..400) == topic.get(..400))
                && (*p == payload || payload == b"17" || is_cut_of(p))),
            "{reason} {topic}"
        );
        assert!(!row.get::<_, String>(3).is_empty());
        *found.entry(reason).or_default() += 1;
    }
    assert_eq!(found, expected);
    // What is in the tables is counted, and acknowledged, a moment later.
    until_metric(&floor.consumer, "ingest_acknowledged_total", messages as u64).await;
    let metrics = floor.consumer.metrics().await.unwrap();
    for (reason, count) in expected {
        let counted = metrics.labelled("ingest_dead_letters_total", "reason", &reason);
        assert_eq!(counted, Some(count as f64), "{reason}");
    }
    let tolerated = |what| metrics.labelled("ingest_tolerated_total", "what", what);
    assert_eq!(tolerated("empty"), Some(1.0), "acknowledged, neither a row nor a dead letter");
    assert_eq!(tolerated("compressed"), Some(2.0), "readings, not messages");
    assert_eq!(tolerated("padding"), Some(1.0));
    assert_eq!(metrics.count("ingest_rows_in_flight"), 0);
    assert_eq!(metrics.count("ingest_acknowledged_total"), metrics.count("ingest_received_total"));
}

#[tokio::test]
async fn an_array_is_one_row_each_and_a_bad_element_costs_itself() {
    let floor = Floor::new(Options::alone(), |launch| launch).await;
    let base = jiff::Timestamp::now();
    let element = |n: i64| reading(3, &(base + jiff::SignedDuration::from_millis(n)).to_string());
    let mut elements: Vec<String> = (0..100).map(element).collect();
    elements[40] = elements[40].replace(":3}", ":1e999999}");
    elements[41] = "null".into();
    let mut publisher = floor.publisher();
    publisher.publish(&topic(3), format!("[{}]", elements.join(",")));
    publisher.publish(&topic(3), "[]");
    publisher.accepted().await;
    floor.until(READINGS, 98).await;
    floor.until("SELECT count(*) FROM dead_letters", 2).await;
}
