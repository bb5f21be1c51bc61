//! Committed keys are read again on both nodes: what is there is counted, what is not is found.

use std::time::Duration;

use ingest::audit::Audit;
use ingest::batch::Batch as _;
use ingest::clock::Clock;
use ingest::metrics::AuditMetrics;
use ingest::settings::IngestSettings;
use ingest::telemetry::Batch;
use playground::cluster::Options;
use service::metrics::Registry;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::fixture::{Fixture, connected};

#[tokio::test]
async fn a_committed_reading_that_is_gone_is_found_on_both_nodes() {
    let mut fixture = Fixture::on_both_nodes(Options::default()).await;
    let mut batch = fixture.batch();
    for number in 0..30 {
        let delivery = fixture.delivery(number, 0, "{}");
        fixture.push(&mut batch, delivery);
    }
    assert_eq!(fixture.commit(&mut batch).await.rows, 30);
    let metrics = AuditMetrics::new(&Registry::new()).unwrap();
    let audit = Audit::new(metrics.clone());
    let mut keys = 0;
    for random in [0, u64::MAX, 17] {
        let sample = batch.sample(random);
        assert_eq!(sample.keys.len(), 3, "one of each third");
        keys += sample.keys.len() as u64;
        audit.note(sample);
    }
    // Somebody deletes a row that is among the keys.
    let lost = batch.sample(0).keys[1].id.clone();
    let deleted =
        fixture.db.execute("DELETE FROM device_telemetry WHERE device_id = $1", &[&lost.as_ref()]).await;
    assert_eq!(deleted.unwrap(), 1);
    let shutdown = CancellationToken::new();
    let retention = Some(Duration::from_secs(3600));
    let clock = Clock::new(&IngestSettings::default());
    let run = audit.run::<Batch>(fixture.database.clone(), clock, retention, shutdown.clone());
    let looked = async {
        let checked = |role| metrics.checked.with_label_values(&[role]).get();
        let deadline = Instant::now() + Duration::from_secs(120);
        while checked("primary") < keys || checked("standby") < keys {
            assert!(Instant::now() < deadline, "{} {}", checked("primary"), checked("standby"));
            sleep(Duration::from_millis(50)).await;
        }
        shutdown.cancel();
    };
    tokio::join!(run, looked);
    let missing = |role| metrics.missing.with_label_values(&[role]).get();
    // The row is in the sample of 0 and may be in others.
    assert!(missing("primary") >= 1, "found on the primary");
    assert_eq!(missing("primary"), missing("standby"));
    assert_eq!((metrics.unverified.get(), metrics.skipped.get()), (0, 0));
}

/// A refused reading is in no table; its neighbours are, and whoever sends it must not keep them from being looked at.
#[tokio::test]
async fn refused_readings_do_not_keep_others_from_being_read_again() {
    let mut fixture = Fixture::new(Options::alone()).await;
    fixture.refuse_poison().await;
    let mut batch = fixture.batch();
    for number in 0..40 {
        let metrics = match number {
            0 | 13 | 14 | 39 => r#"{"poison":1}"#,
            20 => r#"{"text":"\u0000"}"#,
            _ => "{}",
        };
        let delivery = fixture.delivery(number, 0, metrics);
        fixture.push(&mut batch, delivery);
    }
    assert_eq!(fixture.commit(&mut batch).await.rows, 35);
    let client = connected(&fixture.database).await;
    for random in 0..40 {
        let chosen = batch.sample(random | random << 16 | random << 32);
        assert_eq!((chosen.keys.len(), chosen.skipped), (3, 0), "one of each third");
        assert!(Batch::missing(&client, &chosen.keys).await.unwrap().is_empty(), "{chosen:?}");
    }

    // A third of nothing but refused rows is said.
    batch.clear();
    for number in 100..109 {
        let metrics = if number < 103 { r#"{"poison":1}"# } else { "{}" };
        let delivery = fixture.delivery(number, 0, metrics);
        fixture.push(&mut batch, delivery);
    }
    assert_eq!(fixture.commit(&mut batch).await.rows, 6);
    let chosen = batch.sample(0);
    assert_eq!((chosen.keys.len(), chosen.skipped), (2, 1));
}
