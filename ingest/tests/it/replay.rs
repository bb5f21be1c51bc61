//! Dead letters tried again: what is good now is stored and its letter deleted, exactly once; what is not stays.

use std::time::Duration;

use ingest::batch::Batch as _;
use ingest::dead_letter::Reason;
use ingest::replay::{Filter, Replay, Report};
use ingest::settings::IngestSettings;
use playground::cluster::Options;
use tokio_util::sync::CancellationToken;

use crate::aborting_proxy::AbortingProxy;
use crate::fixture::{Fixture, message, reading};

const HOUR: i64 = 3_600_000_000;

async fn replay(fixture: &Fixture, filter: Filter, dry_run: bool) -> Report {
    // A retention that takes what was too old before.
    let settings = IngestSettings { retention: Duration::from_secs(48 * 3600), ..IngestSettings::default() };
    let replay = Replay { database: fixture.database.clone(), settings, filter, dry_run };
    replay.run(&CancellationToken::new(), |_| {}).await.unwrap()
}

/// Letters of readings that are too old (60, one of them in an array), of junk (5) and of a reading in conflict (1).
async fn with_letters() -> (Fixture, AbortingProxy) {
    let (mut fixture, proxy) = Fixture::behind_aborting_proxy(Options::alone()).await;
    let mut batch = fixture.batch();
    for number in 0..59 {
        let late = fixture.delivery(number, -25 * HOUR, r#"{"rpm":1}"#);
        fixture.push(&mut batch, late);
    }
    let elements = [reading(59, fixture.now_us - 26 * HOUR, "{}"), reading(59, fixture.now_us, "{}")];
    fixture.push(&mut batch, message(59, &format!("[{}]", elements.join(","))));
    (0..5).for_each(|number| fixture.push(&mut batch, message(number, "junk")));
    for metrics in [r#"{"rpm":1}"#, r#"{"rpm":2}"#] {
        let same = fixture.delivery(100, 0, metrics);
        fixture.push(&mut batch, same);
    }
    assert_eq!(fixture.commit(&mut batch).await.rows, 2);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 66);
    (fixture, proxy)
}

#[tokio::test]
async fn what_is_good_now_is_stored_once_and_the_rest_stays() {
    let (fixture, _proxy) = with_letters().await;
    let everything = replay(&fixture, Filter::default(), true).await;
    let expected = Report { letters: 66, replayed: 60, rows: 60, duplicates: 0, refused: 6, cut: 0 };
    assert_eq!(everything, expected);
    assert_eq!(fixture.readings().await, 2, "a dry run changes nothing");
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 66);

    let junk = Filter { reason: Some(Reason::NotJson), since: None };
    assert_eq!(replay(&fixture, junk, false).await, Report { letters: 5, refused: 5, ..Report::default() });
    let future = jiff::Timestamp::from_microsecond(fixture.now_us + HOUR).unwrap();
    let later = Filter { reason: None, since: Some(future) };
    assert_eq!(replay(&fixture, later, false).await, Report::default());

    assert_eq!(replay(&fixture, Filter::default(), false).await, expected);
    assert_eq!(fixture.readings().await, 62);
    assert_eq!(
        fixture.count("SELECT count(*) FROM dead_letters WHERE reason IN ('not_json', 'conflict')").await,
        6
    );
    let again = replay(&fixture, Filter::default(), false).await;
    assert_eq!(again, Report { letters: 6, refused: 6, ..Report::default() });
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 6);
}

/// A letter goes only with the commit of its readings: two replays at once, and a server that aborts some of them.
#[tokio::test]
async fn replays_that_meet_or_fail_store_each_reading_once() {
    let (fixture, proxy) = with_letters().await;
    proxy.abort_copies(3);
    let (one, other) =
        tokio::join!(replay(&fixture, Filter::default(), false), replay(&fixture, Filter::default(), false));
    assert!(proxy.is_done());
    assert_eq!(one.replayed + other.replayed, 60, "{one:?} {other:?}");
    assert_eq!(fixture.readings().await, 62);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 6);
}

/// What a trigger refused is good when the trigger is gone.
#[tokio::test]
async fn what_the_database_refused_is_taken_when_it_is_mended() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let sql = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
        $$ BEGIN IF NEW.device_id = 'D-3' THEN RAISE EXCEPTION 'no' USING ERRCODE = '22023'; END IF; RETURN NEW; END $$; \
        CREATE TRIGGER refuse BEFORE INSERT ON device_telemetry FOR EACH ROW EXECUTE FUNCTION refuse()";
    fixture.db.batch_execute(sql).await.unwrap();
    let mut batch = fixture.batch();
    for number in 0..10 {
        let delivery = fixture.delivery(number, 0, "{}");
        fixture.push(&mut batch, delivery);
    }
    assert_eq!(fixture.commit(&mut batch).await.rows, 9);
    let all = Filter::default();
    assert_eq!(
        replay(&fixture, all.clone(), false).await,
        Report { letters: 1, refused: 1, ..Report::default() }
    );
    fixture.db.batch_execute("DROP TRIGGER refuse ON device_telemetry").await.unwrap();
    assert_eq!(replay(&fixture, all, false).await.replayed, 1);
    assert_eq!(fixture.readings().await, 10);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 0);
    assert_eq!(batch.deliveries_mut().settle().len(), 10);
}
