//! What the elected process drops, and what it keeps although a clock says that it is old.

use std::time::Duration;

use ingest::clock::Clock;
use ingest::dead_letter::{self, DeadLetter, Reason};
use ingest::maintenance::Maintenance;
use ingest::metrics::Metrics;
use ingest::partitions::{self, Layout, Table};
use ingest::settings::IngestSettings;
use ingest::transaction;
use playground::cluster::Options;
use playground::postgres::Role;
use service::metrics::Registry;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::fixture::{Fixture, connected, layout};

const HOUR: i64 = 3_600_000_000;
/// The next minute's partition is up to a minute away.
const PATIENCE: Duration = Duration::from_secs(120);

/// The upkeep of one process; ends when it is dropped.
struct Upkeep {
    metrics: Metrics,
    _tasks: JoinSet<()>,
}

impl Upkeep {
    fn start(fixture: &Fixture, settings: &IngestSettings) -> Self {
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let maintenance = Maintenance {
            database: fixture.database.clone(),
            settings: settings.clone(),
            clock: Clock::new(settings),
            metrics: metrics.clone(),
            migrate: true,
            partitions: true,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(maintenance.run(CancellationToken::new(), CancellationToken::new()));
        Self { metrics, _tasks: tasks }
    }

    /// Waits until it has looked at everything once more, from beginning to end.
    async fn one_more_look(&self) {
        for _ in 0..2 {
            let before = self.metrics.upkeep_succeeded.get();
            until("a look", async || self.metrics.upkeep_succeeded.get() > before).await;
        }
    }
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// One reading each of some devices, `at_us` after now, in the partition of that time.
async fn store(fixture: &Fixture, devices: std::ops::Range<usize>, at_us: i64) {
    let mut client = connected(&fixture.database).await;
    let layout = layout();
    let us = fixture.now_us + at_us;
    partitions::ensure(&mut client, &layout, &layout.cells([us].into_iter())).await.unwrap();
    let time = jiff::Timestamp::from_microsecond(us).unwrap();
    for device in devices {
        let sql =
            format!("INSERT INTO device_telemetry VALUES ('D-{device}', 't', 's', '{time}', null, '{{}}')");
        client.batch_execute(&sql).await.unwrap();
    }
}

#[tokio::test]
async fn a_partition_goes_only_when_devices_bear_the_clocks_out() {
    let fixture = Fixture::new(Options::alone()).await;
    // To the clocks it is too old; but nothing newer was ever sent: the clocks may be ahead by 30 hours.
    store(&fixture, 0..5, -30 * HOUR).await;
    let upkeep = Upkeep::start(&fixture, &IngestSettings::default());
    upkeep.one_more_look().await;
    assert_eq!(fixture.readings().await, 5);
    // Two devices may be wrong.
    store(&fixture, 0..2, 0).await;
    upkeep.one_more_look().await;
    assert_eq!(fixture.readings().await, 7);
    store(&fixture, 2..3, 0).await;
    until("the old partition is dropped", async || fixture.readings().await == 3).await;
    let client = connected(&fixture.database).await;
    let old = jiff::Timestamp::from_microsecond(fixture.now_us - 30 * HOUR).unwrap();
    let old = old.strftime("device_telemetry_%Y%m%d_%H%M00").to_string();
    // Detached first, then dropped.
    until("its table is gone", async || {
        !partitions::taken_names(&client, Table::DeviceTelemetry).await.unwrap().contains(&old)
    })
    .await;
}

#[tokio::test]
async fn a_fleet_of_one_device_is_enough_for_its_own_partitions() {
    let fixture = Fixture::new(Options::alone()).await;
    store(&fixture, 0..1, -30 * HOUR).await;
    store(&fixture, 0..1, 0).await;
    let _upkeep = Upkeep::start(&fixture, &IngestSettings::default());
    until("the old partition is dropped", async || fixture.readings().await == 1).await;
}

/// From three devices to two, to one: the last ones are no witnesses for partitions of three. These go when nothing has been
/// written to them for the retention; what is written to stays.
#[tokio::test]
async fn what_a_larger_fleet_has_left_goes_after_a_quiet_retention() {
    let fixture = Fixture::new(Options::alone()).await;
    for (devices, hours) in [(3, -40), (2, -36)] {
        store(&fixture, 0..devices, hours * HOUR).await;
    }
    // The one that is left.
    store(&fixture, 0..1, 0).await;
    let retention = Duration::from_secs(12);
    let settings =
        IngestSettings { retention, future_tolerance: Duration::from_secs(1), ..IngestSettings::default() };
    let started = Instant::now();
    let upkeep = Upkeep::start(&fixture, &settings);
    upkeep.one_more_look().await;
    assert!(started.elapsed() > retention || fixture.readings().await == 6, "two have no witnesses");
    assert!(upkeep.metrics.partitions_overdue.get() > 38.0 * 3600.0);
    // A late reading: its partition is not quiet.
    let late = async || {
        let sql = "INSERT INTO device_telemetry SELECT 'D-0', 't', 's', max(timestamp_utc) + interval '1 microsecond', null, '{}' \
                   FROM device_telemetry WHERE timestamp_utc BETWEEN now() - interval '37 hours' AND now() - interval '1 hour'";
        fixture.db.batch_execute(sql).await.unwrap();
    };
    let old = "SELECT count(*) FROM device_telemetry WHERE timestamp_utc < now() - interval '37 hours'";
    until("what is quiet is dropped", async || {
        late().await;
        fixture.count(old).await == 0
    })
    .await;
    assert!(started.elapsed() >= retention, "not before");
    let newer = "SELECT count(*) FROM device_telemetry WHERE timestamp_utc < now() - interval '1 hour'";
    assert!(fixture.count(newer).await > 2, "it is written to");
}

#[tokio::test]
async fn a_partition_that_cannot_be_dropped_keeps_none_from_being_made() {
    let fixture = Fixture::new(Options::alone()).await;
    store(&fixture, 0..3, -30 * HOUR).await;
    store(&fixture, 0..3, 0).await;
    // Somebody reads the old one and does not end.
    let mut reader = fixture.cluster.connect(Role::Owner).await.unwrap();
    let open = reader.transaction().await.unwrap();
    open.query("SELECT * FROM device_telemetry", &[]).await.unwrap();
    let upkeep = Upkeep::start(&fixture, &IngestSettings::default());
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%CONCURRENTLY%' AND wait_event_type = 'Lock'";
    until("the drop waits", async || fixture.count(waiting).await > 0).await;
    let client = connected(&fixture.database).await;
    let ahead = async || partitions::list(&client, Table::DeviceTelemetry).await.unwrap().partitions;
    let before = ahead().await.len();
    until("another minute is made", async || ahead().await.len() > before).await;
    assert!(fixture.count(waiting).await > 0 || upkeep.metrics.upkeep_failures.get() > 0);
    open.rollback().await.unwrap();
    until("the old partition is dropped", async || fixture.readings().await == 3).await;
}

/// A letter received `at_us` after now.
fn letter(fixture: &Fixture, at_us: i64, bytes: usize) -> DeadLetter {
    // What compresses takes no room.
    let payload: Vec<u8> = (0..bytes).map(|_| rand::random()).collect();
    let at_us = fixture.now_us + at_us;
    DeadLetter::new(at_us, "mqtt", &"t".into(), Reason::NotJson, "e", payload.into(), 1 << 20)
}

/// In a transaction of its own.
async fn insert_letters(client: &tokio_postgres::Client, letters: &[DeadLetter]) {
    client.batch_execute(transaction::BEGIN).await.unwrap();
    dead_letter::insert(client, letters).await.unwrap();
    transaction::commit(client).await.unwrap();
}

async fn insert(fixture: &Fixture, at_us: i64, bytes: usize, count: usize) {
    let client = connected(&fixture.database).await;
    let letters: Vec<DeadLetter> = (0..count).map(|_| letter(fixture, at_us, bytes)).collect();
    insert_letters(&client, &letters).await;
}

#[tokio::test]
async fn a_letter_of_any_time_is_stored_also_by_who_may_make_no_tables() {
    let fixture = Fixture::new(Options::alone()).await;
    let writer = fixture.cluster.connect(Role::Writer).await.unwrap();
    let times = [-10_000 * HOUR, -30 * HOUR, 0, 20 * HOUR, 30 * HOUR, 10_000 * HOUR];
    for at in times {
        insert_letters(&writer, &[letter(&fixture, at, 10)]).await;
    }
    let in_default = "SELECT count(*) FROM dead_letters_default";
    assert_eq!(fixture.count(in_default).await, 6, "nobody has made a partition");
    // Those of today and tomorrow move when their partition is made.
    let _upkeep = Upkeep::start(&fixture, &IngestSettings::default());
    until("letters move", async || fixture.count(in_default).await <= 4).await;
    assert_eq!(fixture.count("SELECT count(DISTINCT id) FROM dead_letters").await, 6);
    let listing = partitions::list(&*connected(&fixture.database).await, Table::DeadLetters).await.unwrap();
    assert!(listing.partitions.len() >= 2 && listing.default.is_some());
}

#[tokio::test]
async fn old_letters_go_after_their_retention() {
    let fixture = Fixture::new(Options::alone()).await;
    let mut client = connected(&fixture.database).await;
    let settings = IngestSettings::default();
    let layout = Layout::of_dead_letters(&settings);
    let old = -16 * 24 * HOUR;
    partitions::ensure(&mut client, &layout, &layout.cells([fixture.now_us + old].into_iter()))
        .await
        .unwrap();
    insert(&fixture, old, 10, 7).await;
    insert(&fixture, 0, 10, 2).await;
    let upkeep = Upkeep::start(&fixture, &settings);
    upkeep.one_more_look().await;
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 9, "no device bears the clocks out");
    store(&fixture, 0..3, 0).await;
    until("old letters are dropped", async || fixture.count("SELECT count(*) FROM dead_letters").await == 2)
        .await;
    until("they are counted", async || {
        upkeep.metrics.letters.dropped.with_label_values(&["retention"]).get() == 7
    })
    .await;
}

#[tokio::test]
async fn letters_stay_within_their_bound() {
    const MIB: i64 = 1 << 20;
    let fixture = Fixture::new(Options::alone()).await;
    let mut client = connected(&fixture.database).await;
    let settings =
        IngestSettings { dead_letter_max_bytes: bytesize::ByteSize::mib(16), ..IngestSettings::default() };
    let layout = Layout::of_dead_letters(&settings);
    let days = [-50 * HOUR, -26 * HOUR];
    let cells = layout.cells(days.iter().map(|at| fixture.now_us + at));
    partitions::ensure(&mut client, &layout, &cells).await.unwrap();
    for at in days {
        insert(&fixture, at, 100_000, 60).await;
    }
    let size = "SELECT sum(pg_total_relation_size(relid))::bigint FROM pg_partition_tree('dead_letters')";
    let letters = "SELECT count(*) FROM dead_letters";
    assert!(fixture.count(size).await < 16 * MIB);
    let upkeep = Upkeep::start(&fixture, &settings);
    upkeep.one_more_look().await;
    assert_eq!(fixture.count(letters).await, 120, "two days within the bound");

    // The oldest day makes room, whole and not in silence.
    insert(&fixture, 0, 100_000, 60).await;
    until("the oldest day is dropped", async || fixture.count(letters).await == 120).await;
    until("they are counted", async || {
        upkeep.metrics.letters.dropped.with_label_values(&["size"]).get() == 60
    })
    .await;
    let oldest = format!(
        "SELECT (extract(epoch FROM min(received_at)) * 1000000)::bigint - {} FROM dead_letters",
        fixture.now_us
    );
    assert_eq!(fixture.count(&oldest).await, -26 * HOUR);

    // Half of the bound by this day alone: payloads stay away, what they were is known.
    insert(&fixture, 0, 100_000, 30).await;
    let payloads = "SELECT count(*) FROM dead_letter_storage WHERE NOT payloads";
    until("payloads are left out", async || fixture.count(payloads).await == 1).await;
    let whole = letter(&fixture, 1, 100_000);
    insert_letters(&client, std::slice::from_ref(&whole)).await;
    let row = fixture
        .db
        .query_one(
            "SELECT length(payload), payload_bytes, payload_sha256 = sha256($1), error FROM dead_letters ORDER BY id DESC LIMIT 1",
            &[&whole.payload.as_ref()],
        )
        .await
        .unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2), row.get(3)), (0_i32, 100_000_i64, true, "e"));

    // Three quarters: nothing is stored any more.
    insert(&fixture, 0, 1, 40_000).await;
    until("letters are left out", async || {
        fixture.count("SELECT count(*) FROM dead_letter_storage WHERE letters").await == 0
    })
    .await;
    // The other day makes room for it.
    until("the other day is dropped", async || {
        upkeep.metrics.letters.dropped.with_label_values(&["size"]).get() == 120
    })
    .await;
    let before = fixture.count(letters).await;
    insert(&fixture, 0, 1, 1_000).await;
    assert_eq!(fixture.count(letters).await, before);
    assert!(fixture.count(size).await <= 16 * MIB);
    // The day ends, here by hand: everything is stored again.
    fixture.db.batch_execute("TRUNCATE dead_letters").await.unwrap();
    until("letters are stored again", async || {
        fixture.count("SELECT count(*) FROM dead_letter_storage WHERE letters AND payloads").await == 1
    })
    .await;
    insert(&fixture, 0, 10, 1).await;
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters WHERE length(payload) = 10").await, 1);
    // Without the row, too: it may have been deleted by hand.
    fixture.db.batch_execute("DELETE FROM dead_letter_storage").await.unwrap();
    insert(&fixture, 0, 10, 1).await;
    assert_eq!(fixture.count(letters).await, 2);
}

/// Somebody reads a day that should go, and does not end: what is stored of new letters is decided all the same.
#[tokio::test]
async fn a_day_that_cannot_be_dropped_does_not_lift_the_bound() {
    let fixture = Fixture::new(Options::alone()).await;
    let mut client = connected(&fixture.database).await;
    let settings =
        IngestSettings { dead_letter_max_bytes: bytesize::ByteSize::mib(16), ..IngestSettings::default() };
    let layout = Layout::of_dead_letters(&settings);
    let old = -50 * HOUR;
    let cells = layout.cells([fixture.now_us + old].into_iter());
    partitions::ensure(&mut client, &layout, &cells).await.unwrap();
    insert(&fixture, old, 100_000, 90).await;
    let upkeep = Upkeep::start(&fixture, &settings);
    upkeep.one_more_look().await;
    let day = partitions::list(&client, Table::DeadLetters).await.unwrap().partitions[0].name.clone();
    let mut reader = fixture.cluster.connect(Role::Owner).await.unwrap();
    let open = reader.transaction().await.unwrap();
    open.query(&format!("SELECT count(*) FROM {day}"), &[]).await.unwrap();
    insert(&fixture, 0, 100_000, 90).await;
    until("payloads are left out", async || {
        fixture.count("SELECT count(*) FROM dead_letter_storage WHERE NOT payloads AND letters").await == 1
    })
    .await;
    // Another day's worth: together they would never end.
    insert(&fixture, 0, 1, 60_000).await;
    until("letters are left out", async || {
        fixture.count("SELECT count(*) FROM dead_letter_storage WHERE letters").await == 0
    })
    .await;
    assert!(upkeep.metrics.upkeep_failures.get() > 0);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters WHERE length(payload) = 100000").await, 180);
    open.rollback().await.unwrap();
}

#[tokio::test]
async fn letters_of_an_earlier_version_are_kept() {
    let fixture = Fixture::new(Options::alone()).await;
    // As it was before: the tables of the first two versions, in a schema of their own, and letters in them.
    let v = [
        include_str!("../../migrations/V1__telemetry.sql"),
        include_str!("../../migrations/V2__sessions.sql"),
        include_str!("../../migrations/V3__dead_letters.sql"),
    ];
    let db = &fixture.db;
    db.batch_execute("CREATE SCHEMA earlier; SET search_path = earlier").await.unwrap();
    db.batch_execute(v[0]).await.unwrap();
    db.batch_execute(v[1]).await.unwrap();
    db.batch_execute(
        "INSERT INTO dead_letters (received_at, source, topic, reason, error, payload) \
         SELECT now() - n * interval '1 hour', 'mqtt', 't', 'not_json', 'e', 'x' FROM generate_series(-5, 100) n",
    )
    .await
    .unwrap();
    db.batch_execute(&format!("BEGIN; {}; COMMIT", v[2])).await.unwrap();
    let count = async |sql: &str| db.query_one(sql, &[]).await.unwrap().get::<_, i64>(0);
    assert_eq!(count("SELECT count(*) FROM dead_letters").await, 106);
    assert_eq!(count("SELECT count(*) FROM dead_letters_default").await, 5, "of times that have not come");
    db.batch_execute(
        "INSERT INTO dead_letters (received_at, source, topic, reason, error, payload) \
         VALUES (now(), 'mqtt', 't', 'a reason of a later version', 'e', 'x')",
    )
    .await
    .unwrap();
    assert_eq!(count("SELECT max(id) FROM dead_letters").await, 107);
    assert_eq!(count("SELECT count(DISTINCT id) FROM dead_letters").await, 107);
}

#[tokio::test]
async fn reports_of_web_sites_go_after_their_retention_when_there_are_newer_ones() {
    let fixture = Fixture::new(Options::alone()).await;
    let reports = "SELECT count(*) FROM site_activity";
    let report =
        "INSERT INTO site_activity SELECT 'a', now() - n * interval '1 day', '{}' FROM generate_series";
    fixture.db.batch_execute(&format!("{report}(80, 100) n")).await.unwrap();
    let upkeep = Upkeep::start(&fixture, &IngestSettings::default());
    upkeep.one_more_look().await;
    assert_eq!(fixture.count(reports).await, 21, "nothing newer has come: the clocks may be ahead");
    drop(upkeep);
    fixture.db.batch_execute(&format!("{report}(0, 0) n")).await.unwrap();
    let _upkeep = Upkeep::start(&fixture, &IngestSettings::default());
    until("old reports are deleted", async || fixture.count(reports).await == 11).await;
}
