//! Session events into a real table: any order, repetition and batching leaves the same rows.

use bytes::Bytes;
use ingest::batch::{Batch as _, Path};
use ingest::delivery::{Ack, Delivery};
use ingest::failure::WriteError;
use ingest::reading::Rules;
use ingest::session::{Batch, Session};
use ingest::settings::IngestSettings;
use playground::cluster::Options;
use rand::rngs::SmallRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use tokio::time::Instant;

use crate::fixture::{Fixture, PATIENCE, connected};

fn delivery(number: usize, payload: String) -> Delivery {
    let ack = Ack { connection: 1, id: number as u64 };
    Delivery::new(Bytes::from_static(b"user_activity_queue"), Bytes::from(payload), Some(ack), Instant::now())
}

fn batch(fixture: &Fixture, payloads: &[String]) -> Batch {
    let newest_us = fixture.now_us + 60_000_000;
    let mut batch = Batch::new("rabbitmq", Rules::new(0, newest_us, 1 << 20));
    for (number, payload) in payloads.iter().enumerate() {
        batch.push(
            delivery(number, payload.clone()),
            fixture.now_us,
            &mut Batch::memory(&IngestSettings::default()),
        );
    }
    batch.seal();
    batch
}

/// Commits as a writer does. Returns rows and duplicates.
async fn commit(fixture: &Fixture, batch: &mut Batch) -> (usize, usize) {
    let mut client = connected(&fixture.database).await;
    let committed = match batch.commit(&mut client, Path::Fast, PATIENCE).await {
        Err(WriteError::Data { .. }) => batch.commit(&mut client, Path::Isolate, PATIENCE).await,
        other => other,
    };
    let committed = committed.unwrap();
    (committed.rows, committed.duplicates)
}

fn time(second: i64) -> String {
    format!("2026-02-03T04:05:{second:02}.000001Z")
}

/// An event or a report over few sessions, users and times, so that ties are common.
fn random_message(random: &mut SmallRng) -> String {
    let pick = |random: &mut SmallRng, of: &[&str]| (*of.choose(random).unwrap()).to_owned();
    let optional = |random: &mut SmallRng, key: &str, of: &[&str]| match random.random_bool(0.5) {
        true => format!(r#""{key}":"{}","#, of.choose(random).unwrap()),
        false => String::new(),
    };
    let common = |random: &mut SmallRng| {
        format!(
            r#""session_id":"S{}",{}{}{}"user_id":"{}","connection_status":"{}""#,
            random.random_range(0..4),
            optional(random, "username", &["ann", "Ann", "bob", "élan"]),
            optional(random, "ip_address", &["10.0.0.1", "10.0.0.2"]),
            optional(random, "region", &["EU", "NA-WEST"]),
            pick(random, &["u1", "u2"]),
            pick(random, &["active", "idle", "disconnected"]),
        )
    };
    let at = time(random.random_range(0..6));
    if random.random_bool(0.7) {
        let event = pick(random, &["login", "active", "idle", "logout"]);
        return format!(r#"{{"event":"{event}","timestamp":"{at}",{}}}"#, common(random));
    }
    let entries: Vec<String> = (0..random.random_range(0..4))
        .map(|_| {
            let login = time(random.random_range(0..6));
            format!(r#"{{"login_time":"{login}",{}}}"#, common(random))
        })
        .collect();
    format!(
        r#"{{"site_id":"W{}","timestamp_utc":"{at}","metrics":{{"active_users":{}}},"active_users_list":[{}]}}"#,
        random.random_range(0..2),
        random.random_range(0..3),
        entries.join(",")
    )
}

const COLUMNS: &str = "SELECT row(session_id, user_id, username, connection_status, region, ip_address, login_time, \
    logout_time, last_activity, username_at, region_at, ip_address_at, logout_at)::text FROM user_sessions \
    UNION ALL SELECT row(site_id, timestamp_utc, metrics)::text FROM site_activity ORDER BY 1";

async fn tables(fixture: &Fixture) -> Vec<String> {
    let rows = fixture.db.query(COLUMNS, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn any_order_repetition_and_batching_leaves_the_same_tables() {
    let fixture = Fixture::new(Options::alone()).await;
    for seed in 0..20 {
        let mut random = SmallRng::seed_from_u64(seed);
        let messages: Vec<String> = (0..40).map(|_| random_message(&mut random)).collect();
        let mut expected = None;
        for _ in 0..4 {
            fixture.db.batch_execute("TRUNCATE user_sessions, site_activity").await.unwrap();
            let mut arriving = messages.clone();
            arriving.extend(messages.iter().filter(|_| random.random_bool(0.3)).cloned());
            arriving.shuffle(&mut random);
            let mut rest = arriving.as_slice();
            // Two writers at a time, whose batches overlap.
            while !rest.is_empty() {
                let (first, after) = rest.split_at(random.random_range(1..=rest.len()));
                let (second, after) = after.split_at(random.random_range(0..=after.len()));
                let (mut first, mut second) = (batch(&fixture, first), batch(&fixture, second));
                tokio::join!(commit(&fixture, &mut first), commit(&fixture, &mut second));
                rest = after;
            }
            let found = tables(&fixture).await;
            assert!(!found.is_empty());
            assert_eq!(*expected.get_or_insert(found.clone()), found, "seed {seed}");
        }
        assert_eq!(fixture.count("SELECT count(*) FROM dead_letters").await, 0, "seed {seed}");
    }
}

#[tokio::test]
async fn the_table_is_what_the_fold_says() {
    let fixture = Fixture::new(Options::alone()).await;
    let mut random = SmallRng::seed_from_u64(7);
    let messages: Vec<String> = (0..300).map(|_| random_message(&mut random)).collect();
    for part in messages.chunks(7) {
        commit(&fixture, &mut batch(&fixture, part)).await;
    }
    let mut folded: std::collections::BTreeMap<String, Session> = Default::default();
    for message in &messages {
        let mut seen = Fold(&mut folded);
        let rules = Rules::new(0, i64::MAX, 1 << 20);
        ingest::session::visit(message.as_bytes(), &rules, &mut seen);
    }
    let rows = fixture
        .db
        .query(
            "SELECT session_id, user_id, connection_status, username, region, ip_address, \
             (extract(epoch FROM last_activity) * 1000000)::bigint, (extract(epoch FROM login_time) * 1000000)::bigint, \
             (extract(epoch FROM logout_time) * 1000000)::bigint FROM user_sessions",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(rows.len(), folded.len());
    for row in rows {
        let session = &folded[row.get::<_, &str>(0)];
        let text = |detail: &Option<(i64, Box<str>)>| detail.as_ref().map(|(_, text)| text.to_string());
        assert_eq!(row.get::<_, &str>(1), &*session.newest.user_id);
        assert_eq!(row.get::<_, &str>(2), session.newest.status.as_str());
        assert_eq!(row.get::<_, Option<String>>(3), text(&session.username));
        assert_eq!(row.get::<_, Option<String>>(4), text(&session.region));
        assert_eq!(row.get::<_, Option<String>>(5), text(&session.ip_address));
        assert_eq!(row.get::<_, i64>(6), session.newest.at_us);
        assert_eq!(row.get::<_, Option<i64>>(7), session.login_us);
        assert_eq!(row.get::<_, Option<i64>>(8), session.logout_time_us());
    }
}

struct Fold<'f>(&'f mut std::collections::BTreeMap<String, Session>);

impl<'a> ingest::session::Visitor<'a> for Fold<'_> {
    fn session(&mut self, session_id: std::borrow::Cow<'_, str>, session: Session) {
        self.0.entry(session_id.into()).and_modify(|known| known.merge(session.clone())).or_insert(session);
    }
    fn site(&mut self, _: std::borrow::Cow<'_, str>, _: i64, _: &str) {}
    fn rejected(&mut self, _: &'a [u8], rejection: ingest::reading::Rejection) {
        panic!("{rejection:?}");
    }
}

/// What the decoder takes and only the database refuses.
#[tokio::test]
async fn a_report_the_database_refuses_costs_only_itself() {
    let fixture = Fixture::new(Options::alone()).await;
    fixture.refuse_poison().await;
    let report = |site: usize, load: &str| {
        format!(
            r#"{{"site_id":"W{site}","timestamp_utc":"{}","metrics":{{"{load}":1}},"active_users_list":
            [{{"session_id":"S{site}","user_id":"u","connection_status":"active"}}]}}"#,
            time(1)
        )
    };
    let mut payloads: Vec<String> = (0..20).map(|site| report(site, "active_users")).collect();
    payloads[7] = report(7, "poison");
    payloads[11] = "not json".into();
    let mut batch = batch(&fixture, &payloads);
    assert_eq!(batch.parts(), 19 * 2 + 1);
    assert_eq!(commit(&fixture, &mut batch).await, (19 + 18, 0));
    assert_eq!(fixture.count("SELECT count(*) FROM user_sessions").await, 19, "its sessions are stored");
    assert_eq!(fixture.count("SELECT count(*) FROM site_activity").await, 18);
    let letters =
        fixture.db.query("SELECT reason, payload FROM dead_letters ORDER BY reason", &[]).await.unwrap();
    let letters: Vec<(String, Vec<u8>)> = letters.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(
        letters,
        [
            ("not_json".into(), b"not json".to_vec()),
            ("rejected_by_database".into(), payloads[7].clone().into_bytes())
        ]
    );
    let settled = batch.deliveries_mut().settle();
    let rejected: Vec<u64> = settled.iter().filter(|s| s.rejected.is_some()).map(|s| s.ack.id).collect();
    assert_eq!((settled.len(), rejected), (20, vec![7, 11]));
}
