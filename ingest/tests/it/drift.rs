//! Somebody changes the tables under us: one bad row costs only itself, a table that refuses everything holds the readings.

use std::sync::Arc;
use std::time::Duration;

use ingest::audit::Audit;
use ingest::batch::{Batch as _, Path};
use ingest::clock::Clock;
use ingest::delivery::Delivery;
use ingest::letter_log::LetterLog;
use ingest::metrics::{AuditMetrics, Metrics};
use ingest::queue::{self, Sender};
use ingest::settings::IngestSettings;
use ingest::settlement::{Settled, Settlements};
use ingest::telemetry::Batch;
use ingest::writer::Writer;
use playground::cluster::Options;
use service::metrics::Registry;
use service::traces::Tracer;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::fixture::{Fixture, PATIENCE, connected, message};

/// A server that crashes several times takes that long.
const SETTLED_WITHIN: Duration = Duration::from_secs(240);

/// A writer at work on a fixture's database.
pub(crate) struct Writing {
    queue: Option<Sender>,
    pub(crate) settlements: Arc<Settlements>,
    pub(crate) metrics: Metrics,
    tasks: JoinSet<()>,
}

impl Writing {
    pub(crate) fn start(fixture: &Fixture) -> Self {
        let settings = IngestSettings { max_age: Duration::from_millis(20), ..IngestSettings::default() };
        let memory = <Batch as ingest::batch::Batch>::memory(&settings);
        let (sender, receiver) = queue::bounded(100_000, 64 << 20, memory);
        let settlements = Arc::new(Settlements::new(1));
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        let audit = Audit::new(AuditMetrics::new(&registry).unwrap());
        let writer = Writer::<Batch> {
            source: "mqtt",
            clock: Clock::new(&settings),
            settings,
            queue: receiver,
            settlements: settlements.clone(),
            database: fixture.database.clone(),
            metrics: metrics.clone(),
            tracer: Tracer::default(),
            letter_log: LetterLog::default(),
            audit,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(writer.run());
        Self { queue: Some(sender), settlements, metrics, tasks }
    }

    pub(crate) fn send(&self, messages: Vec<Delivery>) {
        assert!(self.queue.as_ref().unwrap().send(messages));
    }

    /// The acknowledgements of this many messages.
    pub(crate) async fn settled(&self, messages: usize) -> Vec<Settled> {
        let mut all = Vec::new();
        let wait = async {
            while all.len() < messages {
                all.extend(self.settlements.take().await.unwrap());
            }
        };
        timeout(SETTLED_WITHIN, wait).await.expect("never settled");
        all
    }

    /// `received = committed + joined + duplicates + dead letters`, and nothing in flight.
    pub(crate) async fn end(mut self) {
        drop(self.queue.take());
        while self.tasks.join_next().await.is_some() {}
        let metrics = &self.metrics;
        let letters: u64 = ingest::dead_letter::Reason::ALL
            .iter()
            .map(|reason| metrics.dead_letters.with_label_values(&[reason.as_str()]).get())
            .sum();
        let settled =
            metrics.rows_committed.get() + metrics.duplicates.get() + metrics.joined.get() + letters;
        assert_eq!(metrics.rows_received.get(), settled);
        assert_eq!(metrics.rows_in_flight.get(), 0);
        assert_eq!(metrics.held_by_schema.get(), 0);
    }
}

pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !is_so().await {
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A trigger on the table of readings; of its partitions too, since those are made like it.
pub(crate) async fn trigger(fixture: &Fixture, body: &str) {
    let sql = format!(
        "CREATE OR REPLACE FUNCTION interfere() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$; \
         CREATE OR REPLACE TRIGGER interfere BEFORE INSERT ON device_telemetry FOR EACH ROW EXECUTE FUNCTION interfere()"
    );
    fixture.db.batch_execute(&sql).await.unwrap();
}

pub(crate) async fn letters(fixture: &Fixture) -> Vec<(String, String)> {
    let sql = "SELECT topic, error FROM dead_letters ORDER BY id";
    let rows = fixture.db.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Errors nobody has classified, an error at COMMIT, a row that is swallowed: each of one device.
#[tokio::test]
async fn a_row_the_table_refuses_costs_only_itself() {
    const BAD: &str = "NEW.device_id = 'D-13'";
    for (name, body, words) in [
        ("raise", format!("IF {BAD} THEN RAISE EXCEPTION 'not this one'; END IF;"), "not this one"),
        ("null", format!("IF {BAD} THEN RETURN NULL; END IF;"), "did not keep the row"),
        ("internal", format!("IF {BAD} THEN RAISE EXCEPTION 'odd' USING ERRCODE = 'XX000'; END IF;"), "odd"),
    ] {
        let mut fixture = Fixture::new(Options::alone()).await;
        trigger(&fixture, &body).await;
        let writing = Writing::start(&fixture);
        writing.send((0..100).map(|n| fixture.delivery(n, 0, "{}")).collect());
        let settled = writing.settled(100).await;
        assert_eq!(fixture.readings().await, 99, "{name}");
        let refused: Vec<u64> = settled
            .iter()
            .filter(|settled| settled.rejected.is_some())
            .map(|settled| settled.ack.id)
            .collect();
        assert_eq!(refused, [13], "{name}");
        let letters = letters(&fixture).await;
        assert_eq!(letters.len(), 1, "{name}: {letters:?}");
        assert!(letters[0].0.ends_with("D-13") && letters[0].1.contains(words), "{name}: {letters:?}");

        // Alone, with no neighbour to compare with.
        fixture.forget();
        writing.send(vec![fixture.delivery(13, 1, "{}")]);
        assert!(writing.settled(1).await[0].rejected.is_some(), "{name}");
        writing.end().await;
    }
}

#[tokio::test]
async fn a_constraint_checked_at_commit_names_its_row() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let sql = "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS \
        $$ BEGIN IF NEW.device_id = 'D-3' THEN RAISE EXCEPTION 'too late' USING ERRCODE = '23514'; END IF; RETURN NULL; END $$; \
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON device_telemetry DEFERRABLE INITIALLY DEFERRED \
        FOR EACH ROW EXECUTE FUNCTION late()";
    fixture.db.batch_execute(sql).await.unwrap();
    let mut batch = fixture.batch();
    (0..10).for_each(|n| {
        let delivery = fixture.delivery(n, 0, "{}");
        fixture.push(&mut batch, delivery);
    });
    batch.seal();
    let mut client = connected(&fixture.database).await;
    let first = batch.commit(&mut client, Path::Fast, PATIENCE).await;
    assert!(first.is_err(), "{first:?}");
    let committed = batch.commit(&mut client, Path::Isolate, PATIENCE).await.unwrap();
    assert_eq!(committed.rows, 9);
    assert_eq!(fixture.readings().await, 9);
}

/// A new column that nobody fills, a trigger that takes nothing, a right that is gone, a table that is gone: nothing becomes
/// a dead letter, nothing is acknowledged, and it goes on when the table is as it was.
pub(crate) async fn check_held(change: &str, back: &str) {
    let fixture = Fixture::new(Options::alone()).await;
    let writing = Writing::start(&fixture);
    writing.send((0..10).map(|n| fixture.delivery(n, 0, "{}")).collect());
    writing.settled(10).await;
    fixture.db.batch_execute(change).await.unwrap();
    writing.send((10..310).map(|n| fixture.delivery(n, 0, "{}")).collect());
    writing.send((310..313).map(|n| message(n, "not json")).collect());
    until("the batch is held", async || writing.metrics.held_by_schema.get() > 0).await;
    assert!(writing.settlements.try_take().is_none(), "{change}: nothing is acknowledged");
    fixture.db.batch_execute(back).await.unwrap();
    let settled = writing.settled(303).await;
    assert_eq!(settled.iter().filter(|settled| settled.rejected.is_some()).count(), 3, "{change}");
    assert_eq!(fixture.readings().await, 310, "{change}");
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 3, "{change}");
    writing.end().await;
}

#[tokio::test]
async fn a_new_column_without_a_default_holds_the_readings() {
    // Rows are there, so the column is added without its constraint and gets it for new rows only.
    check_held(
        "ALTER TABLE device_telemetry ADD COLUMN extra int; \
         ALTER TABLE device_telemetry ADD CONSTRAINT extra_given CHECK (extra IS NOT NULL) NOT VALID",
        "ALTER TABLE device_telemetry DROP COLUMN extra",
    )
    .await;
}

#[tokio::test]
async fn a_trigger_that_refuses_everything_holds_the_readings() {
    let function = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'closed'; END $$;";
    let make =
        "CREATE TRIGGER refuse BEFORE INSERT ON device_telemetry FOR EACH ROW EXECUTE FUNCTION refuse()";
    check_held(&format!("{function} {make}"), "DROP TRIGGER refuse ON device_telemetry").await;
}

#[tokio::test]
async fn a_trigger_that_swallows_everything_holds_the_readings() {
    let function =
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;";
    let make =
        "CREATE TRIGGER swallow BEFORE INSERT ON device_telemetry FOR EACH ROW EXECUTE FUNCTION swallow()";
    check_held(&format!("{function} {make}"), "DROP TRIGGER swallow ON device_telemetry").await;
}

/// Rows with parameters go on fitting; those that we encode do not.
#[tokio::test]
async fn another_type_of_a_column_holds_the_readings() {
    check_held(
        "ALTER TABLE device_telemetry ALTER COLUMN metrics TYPE json USING metrics::json",
        "ALTER TABLE device_telemetry ALTER COLUMN metrics TYPE jsonb USING metrics::jsonb",
    )
    .await;
}

#[tokio::test]
async fn a_table_that_is_gone_holds_the_readings() {
    check_held(
        "ALTER TABLE device_telemetry RENAME TO elsewhere",
        "ALTER TABLE elsewhere RENAME TO device_telemetry",
    )
    .await;
}

#[tokio::test]
async fn a_table_that_was_empty_holds_the_readings_too() {
    let fixture = Fixture::new(Options::alone()).await;
    let change = "ALTER TABLE device_telemetry ADD COLUMN extra int NOT NULL";
    fixture.db.batch_execute(change).await.unwrap();
    let writing = Writing::start(&fixture);
    writing.send((0..300).map(|n| fixture.delivery(n, 0, "{}")).collect());
    until("the batch is held", async || writing.metrics.held_by_schema.get() > 0).await;
    assert!(writing.settlements.try_take().is_none());
    fixture.db.batch_execute("ALTER TABLE device_telemetry DROP COLUMN extra").await.unwrap();
    writing.settled(300).await;
    assert_eq!(fixture.readings().await, 300);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 0);
    writing.end().await;
}

/// An error that counts as the server's whenever one message is in the batch: the batch is halved until the message stands
/// alone, its neighbours are stored, in order.
#[tokio::test]
async fn a_message_the_server_fails_on_does_not_hold_its_neighbours() {
    let fixture = Fixture::new(Options::alone()).await;
    let body = "IF NEW.device_id IN ('D-17', 'D-60') THEN RAISE EXCEPTION 'no memory' USING ERRCODE = '53200'; END IF;";
    trigger(&fixture, body).await;
    let writing = Writing::start(&fixture);
    let mut messages: Vec<Delivery> = (0..100).map(|n| fixture.delivery(n, 0, "{}")).collect();
    messages.push(message(100, "not json"));
    writing.send(messages);
    let settled = writing.settled(101).await;
    assert_eq!(
        settled.iter().map(|settled| settled.ack.id).collect::<Vec<_>>(),
        (0..=100).collect::<Vec<u64>>()
    );
    let refused: Vec<u64> =
        settled.iter().filter(|settled| settled.rejected.is_some()).map(|settled| settled.ack.id).collect();
    assert_eq!(refused, [17, 60, 100]);
    assert_eq!(fixture.readings().await, 98);
    let letters = letters(&fixture).await;
    assert_eq!(letters.len(), 3, "{letters:?}");
    assert!(letters.iter().filter(|(_, error)| error.contains("no memory")).count() == 2, "{letters:?}");
    assert_eq!(writing.metrics.splits.get(), 1);
    writing.end().await;
}

/// What fails for everybody is an outage, not a message.
#[tokio::test]
async fn an_outage_splits_nothing() {
    let fixture = Fixture::new(Options::alone()).await;
    let body = "RAISE EXCEPTION 'no memory' USING ERRCODE = '53200';";
    trigger(&fixture, body).await;
    let commits = "CREATE OR REPLACE FUNCTION interfere() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$";
    let writing = Writing::start(&fixture);
    // Connections are refused meanwhile: nobody can say that other work is taken.
    fixture.db.batch_execute("ALTER ROLE tier0 SET default_transaction_read_only = on").await.unwrap();
    writing.send((0..10).map(|n| fixture.delivery(n, 0, "{}")).collect());
    until("several failures", async || writing.metrics.retries.get() > 3).await;
    fixture.db.batch_execute("ALTER ROLE tier0 RESET default_transaction_read_only").await.unwrap();
    fixture.db.batch_execute(commits).await.unwrap();
    writing.settled(10).await;
    assert_eq!(fixture.readings().await, 10);
    assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 0);
    writing.end().await;
}
