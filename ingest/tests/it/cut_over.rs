//! A new primary is found while the old one is frozen, and the old one is never gone back to.

use std::time::Duration;

use ingest::database::Database;
use ingest::settings::DatabaseSettings;
use playground::child::Reach;
use playground::cluster::{Cluster, Options};
use playground::postgres::Role;
use playground::scratch::Scratch;
use service::health::Health;
use service::secret::Secret;
use tokio::time::{Instant, sleep, timeout};

/// Longer than the test may take: whoever waits for a timeout fails it.
const ORDINARY: Duration = Duration::from_secs(60);

async fn port(database: &Database) -> u16 {
    let client = database.client().await.unwrap();
    let port: i32 = client.query_one("SELECT inet_server_port()", &[]).await.unwrap().get(0);
    u16::try_from(port).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_primary_costs_no_timeout_and_is_not_believed_when_it_thaws() {
    let scratch = Scratch::new().unwrap();
    let mut cluster = Cluster::start(&scratch, Options::default()).await.unwrap();
    let (old, new) = (cluster.primary().port(), cluster.standby().port());
    let settings = DatabaseSettings {
        hosts: format!("127.0.0.1:{old},127.0.0.1:{new}"),
        password: Secret::new(cluster.primary().passwords().of(Role::Owner)),
        connect_timeout: ORDINARY,
        commit_timeout: ORDINARY,
        ..DatabaseSettings::default()
    };
    let database = Database::new(&settings, 3, Health::default().dependency("postgres")).unwrap();
    assert_eq!(port(&database).await, old);
    let client = database.client().await.unwrap();
    client.batch_execute("CREATE TABLE t (a int)").await.unwrap();

    cluster.primary_mut().pause(Reach::Tree);
    let mut waiting = Box::pin(client.batch_execute("INSERT INTO t VALUES (1)"));
    assert!(timeout(Duration::from_millis(200), &mut waiting).await.is_err(), "nobody answers");
    let standby = cluster.standby().admin().await.unwrap();
    standby.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await.unwrap();
    standby.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let attached = "SELECT count(*) FROM pg_stat_wal_receiver";
    while standby.query_one(attached, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        sleep(Duration::from_millis(5)).await;
    }
    let promoted = Instant::now();
    standby.batch_execute("SELECT pg_promote(true)").await.unwrap();
    // The connection to the frozen node ends; the commit was not acknowledged.
    timeout(Duration::from_secs(5), &mut waiting).await.expect("the connection was dropped").unwrap_err();
    drop(waiting);
    drop(client);
    let found = timeout(Duration::from_secs(5), port(&database)).await.expect("the new primary is found");
    assert_eq!(found, new);
    assert!(promoted.elapsed() < Duration::from_secs(5));

    cluster.primary_mut().resume();
    // It is writable by its own words, and asked ten times a second.
    let old_primary = cluster.primary().admin().await.unwrap();
    let recovers: bool = old_primary.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get(0);
    assert!(!recovers);
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        assert_eq!(port(&database).await, new);
    }
    // Nothing the new one does not have was acknowledged by the old one.
    let rows: i64 =
        database.client().await.unwrap().query_one("SELECT count(*) FROM t", &[]).await.unwrap().get(0);
    assert_eq!(rows, 0);
}
