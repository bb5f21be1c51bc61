//! What a collector is told of batches, and what becomes of them when there is none.

use std::collections::BTreeSet;

use playground::child::Reach;
use playground::cluster::Options;
use playground::collector::{Collector, Span};

use crate::floor::{Floor, PATIENCE, READINGS, reading, topic, until_metric};

fn roots(spans: &[Span]) -> impl Iterator<Item = &Span> {
    spans.iter().filter(|span| span.parent.is_empty())
}

fn sum(spans: &[Span], key: &str) -> u64 {
    roots(spans).map(|span| span.count(key)).sum()
}

#[tokio::test]
async fn every_batch_is_told_of_with_its_parts_and_its_failed_tries() {
    let collector = Collector::start().await.unwrap();
    let mut floor = Floor::new(Options::default(), |launch| {
        launch.set("traces.endpoint", collector.endpoint()).set("database.commit_timeout", "1s")
    })
    .await;
    let mut publisher = floor.publisher();
    let now = jiff::Timestamp::now().to_string();
    // The first 500 once more: stored already.
    for number in (0..3_000).chain(0..500) {
        publisher.publish(&topic(number), reading(number, &now));
    }
    publisher.publish("og/field/TX-EAGLE/turbine/TURB-00001", "no JSON");
    publisher.accepted().await;
    floor.until(READINGS, 3_000).await;
    until_metric(&floor.consumer, "ingest_acknowledged_total", 3_501).await;
    // The standby does not answer: a try fails, the same batch is committed when it does.
    floor.cluster.standby_mut().pause(Reach::Tree);
    publisher.publish_readings(3_000, 3_100);
    publisher.accepted().await;
    floor.until_a_commit_is_given_up().await;
    floor.cluster.standby_mut().resume();
    floor.until(READINGS, 3_100).await;
    until_metric(&floor.consumer, "ingest_acknowledged_total", 3_601).await;
    floor.consumer.terminate(PATIENCE).await.unwrap();

    // The last ones left when the process had drained: all are here.
    let spans = collector.spans();
    // The try that was given up may have stored its rows: then the next one found them.
    let (rows, duplicates) = (sum(&spans, "tier0.rows"), sum(&spans, "tier0.duplicates"));
    assert_eq!(rows + duplicates, 3_600);
    assert!((3_000..=3_100).contains(&rows) && duplicates >= 500, "{rows} rows, {duplicates} duplicates");
    assert_eq!(sum(&spans, "tier0.dead_letters"), 1);
    assert_eq!(sum(&spans, "messaging.batch.message_count"), 3_601);
    assert!(
        spans.iter().all(|span| span.service == "mqtt-consumer" && span.started <= span.ended),
        "{spans:#?}"
    );
    for batch in roots(&spans) {
        assert_eq!((batch.name.as_str(), batch.values["messaging.system"].as_str()), ("batch", "mqtt"));
        assert!(batch.count("tier0.bytes") > 0, "{batch:?}");
        let parts: Vec<&Span> = spans.iter().filter(|span| span.parent == batch.id).collect();
        let names: BTreeSet<&str> = parts.iter().map(|part| part.name.as_str()).collect();
        assert!(
            ["queue", "fill", "copy", "commit", "settle"].iter().all(|name| names.contains(name)),
            "{names:?}"
        );
        for part in parts {
            assert_eq!(part.trace, batch.trace);
            // By the microsecond: two clocks are asked one after the other.
            assert!(
                part.started + 1_000 >= batch.started && part.ended <= batch.ended + 1_000,
                "{part:?} {batch:?}"
            );
            assert_eq!(part.error.is_some(), part.name == "try", "{part:?}");
        }
    }
    let tried_again = roots(&spans).find(|batch| {
        spans.iter().any(|span| {
            span.parent == batch.id && span.error.as_deref().is_some_and(|e| e.contains("no answer"))
        })
    });
    assert!(tried_again.unwrap().count("tier0.tries") >= 2);
}

/// Nobody listens at the one endpoint; the other takes connections and never answers. Both cost spans, and nothing else.
#[tokio::test]
async fn a_collector_that_is_away_disturbs_nothing() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    for endpoint in ["http://127.0.0.1:9".to_owned(), format!("http://{}", silent.local_addr().unwrap())] {
        let mut floor = Floor::new(Options::alone(), |launch| {
            launch.set("traces.endpoint", &endpoint).set("traces.queue", 64).set("ingest.max_rows", 10)
        })
        .await;
        let mut publisher = floor.publisher();
        publisher.publish_readings(0, 5_000);
        publisher.accepted().await;
        floor.until(READINGS, 5_000).await;
        until_metric(&floor.consumer, "ingest_acknowledged_total", 5_000).await;
        let dropped = ["queue_full", "not_taken"];
        let metrics = floor.consumer.metrics().await.unwrap();
        let dropped: f64 = dropped
            .iter()
            .map(|reason| metrics.labelled("traces_dropped_spans_total", "reason", reason).unwrap())
            .sum();
        assert!(dropped > 0.0, "{endpoint}");
        assert_eq!(metrics.count("traces_exported_spans_total"), 0);
        let begun = std::time::Instant::now();
        floor.consumer.terminate(PATIENCE).await.unwrap();
        assert!(begun.elapsed() < PATIENCE / 2, "{endpoint}: {:?}", begun.elapsed());
        let log = std::fs::read_to_string(floor.consumer.log()).unwrap();
        // Once a minute, not once a batch.
        assert!((1..5).contains(&log.matches("takes no spans").count()), "{endpoint}: {log}");
    }
}
