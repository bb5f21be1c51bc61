//! A new primary is found while the old one is frozen, and the old one is never gone back to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ingest::database::Database;
use ingest::settings::DatabaseSettings;
use playground::child::Reach;
use playground::cluster::{Cluster, Options};
use playground::postgres::Role;
use playground::scratch::Scratch;
use service::health::Health;
use service::secret::Secret;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Longer than the test may take: whoever waits for a timeout fails it.
const ORDINARY: Duration = Duration::from_secs(600);
/// Well below it: no ordinary limit had to run out.
const SOON: Duration = Duration::from_secs(120);

/// With two nodes at these ports.
fn database(cluster: &Cluster, ports: [u16; 2]) -> Database {
    let settings = DatabaseSettings {
        hosts: ports.map(|port| format!("127.0.0.1:{port}")).join(","),
        password: Secret::new(cluster.primary().passwords().of(Role::Owner)),
        connect_timeout: ORDINARY,
        commit_timeout: ORDINARY,
        ..DatabaseSettings::default()
    };
    Database::new(&settings, 3, Health::default().dependency("postgres")).unwrap()
}

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
    let database = database(&cluster, [old, new]);
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
    let deadline = Instant::now() + SOON;
    while standby.query_one(attached, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        assert!(Instant::now() < deadline, "it goes on to follow");
        sleep(Duration::from_millis(5)).await;
    }
    let promoted = Instant::now();
    standby.batch_execute("SELECT pg_promote(true)").await.unwrap();
    // The connection to the frozen node ends; the commit was not acknowledged.
    timeout(SOON, &mut waiting).await.expect("the connection was dropped").unwrap_err();
    drop(waiting);
    drop(client);
    let found = timeout(SOON, port(&database)).await.expect("the new primary is found");
    assert_eq!(found, new);
    assert!(promoted.elapsed() < SOON);

    cluster.primary_mut().resume();
    // It is writable by its own words, and asked ten times a second. Whoever wrote there would wait for ever: nobody does.
    let old_primary = cluster.primary().admin().await.unwrap();
    let recovers: bool = old_primary.query_one("SELECT pg_is_in_recovery()", &[]).await.unwrap().get(0);
    assert!(!recovers);
    let until = Instant::now() + Duration::from_millis(500);
    let mut acknowledged = Vec::new();
    while Instant::now() < until {
        let number = 100 + i32::try_from(acknowledged.len()).unwrap();
        let client = database.client().await.unwrap();
        let sql = format!("INSERT INTO t VALUES ({number})");
        let written = timeout(SOON, client.batch_execute(&sql)).await;
        written.expect("nobody waits for a standby").unwrap();
        acknowledged.push(number);
    }
    // All that was acknowledged is on the new primary, in its order; the commit that nobody answered is not.
    let direct = cluster.standby().connect(Role::Owner).await.unwrap();
    let rows = direct.query("SELECT a FROM t ORDER BY a", &[]).await.unwrap();
    let stored: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(stored, acknowledged);
}

/// The host of a standby hangs for whoever comes new, and the session that watches it goes on: a promotion is seen
/// through that one at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_takes_no_further_session_is_watched_all_the_same() {
    let scratch = Scratch::new().unwrap();
    let mut cluster = Cluster::start(&scratch, Options::default()).await.unwrap();
    let (old, new) = (cluster.primary().port(), cluster.standby().port());
    let door = Door::open(new).await;
    let database = database(&cluster, [old, door.port]);
    assert_eq!(port(&database).await, old);
    // The watcher is in; the spare that it asked for knocks and hangs.
    let deadline = Instant::now() + SOON;
    while door.knocks() < 2 {
        assert!(Instant::now() < deadline, "a session to watch by, and one to spare");
        sleep(Duration::from_millis(5)).await;
    }
    let standby = cluster.standby().admin().await.unwrap();
    cluster.primary_mut().kill9(Reach::Tree).await.unwrap();
    standby.batch_execute("SELECT pg_promote(true)").await.unwrap();
    door.let_in();
    let found = timeout(SOON, port(&database)).await.expect("the promotion is seen");
    assert_eq!(found, new);
}

/// Lets the first connection through to a server and keeps the others waiting, until told otherwise; those that came
/// before that wait for ever.
struct Door {
    port: u16,
    knocks: Arc<AtomicUsize>,
    is_open: Arc<AtomicBool>,
    _porter: JoinSet<()>,
}

impl Door {
    async fn open(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (knocks, is_open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut porter = JoinSet::new();
        let (seen, open) = (knocks.clone(), is_open.clone());
        porter.spawn(async move {
            let (mut waiting, mut inside) = (Vec::new(), JoinSet::new());
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                if seen.fetch_add(1, Ordering::SeqCst) > 0 && !open.load(Ordering::SeqCst) {
                    waiting.push(client);
                    continue;
                }
                inside.spawn(async move {
                    let mut server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                    // It ends when either side does.
                    drop(copy_bidirectional(&mut client, &mut server).await);
                });
            }
        });
        Self { port, knocks, is_open, _porter: porter }
    }

    fn knocks(&self) -> usize {
        self.knocks.load(Ordering::SeqCst)
    }

    fn let_in(&self) {
        self.is_open.store(true, Ordering::SeqCst);
    }
}
