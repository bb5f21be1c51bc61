//! The servers come up, take what is done to them, and come back.

use std::time::Duration;

use playground::child::Reach;
use playground::cluster::{Cluster, Options};
use playground::mosquitto::Mosquitto;
use playground::postgres::Role;
use playground::procfs;
use playground::scratch::Scratch;

/// For what has to happen.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_committed_row_is_on_the_standby() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::default()).await.unwrap();
    let db = cluster.connect(Role::Owner).await.unwrap();
    db.batch_execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await.unwrap();
    cluster.wait_replayed(PATIENCE).await.unwrap();
    let standby = cluster.standby().connect(Role::Owner).await.unwrap();
    let count: i64 = standby.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get(0);
    assert_eq!(count, 1);
    for (setting, value) in [("fsync", "on"), ("full_page_writes", "on"), ("synchronous_commit", "on")] {
        let found: String = db.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get(0);
        assert_eq!(found, value, "{setting}");
    }
    assert!(
        db.query_one("SELECT rolsuper FROM pg_roles WHERE rolname = current_user", &[])
            .await
            .is_ok_and(|row| !row.get::<_, bool>(0))
    );
}

#[tokio::test]
async fn a_commit_waits_for_the_standby() {
    let scratch = Scratch::new().unwrap();
    let mut cluster = Cluster::start(&scratch, Options::default()).await.unwrap();
    let db = cluster.connect(Role::Owner).await.unwrap();
    db.batch_execute("CREATE TABLE t (a int)").await.unwrap();
    cluster.standby_mut().kill9(Reach::Tree).await.unwrap();
    let insert = db.batch_execute("INSERT INTO t VALUES (1)");
    tokio::pin!(insert);
    assert!(
        tokio::time::timeout(Duration::from_millis(500), &mut insert).await.is_err(),
        "committed without a standby"
    );
    cluster.standby_mut().start().await.unwrap();
    tokio::time::timeout(PATIENCE, insert).await.expect("commits once the standby is back").unwrap();
}

#[tokio::test]
async fn a_killed_primary_comes_back_with_what_it_committed() {
    let scratch = Scratch::new().unwrap();
    let mut cluster = Cluster::start(&scratch, Options::default()).await.unwrap();
    let db = cluster.connect(Role::Owner).await.unwrap();
    db.batch_execute("CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 1000)").await.unwrap();
    let port = cluster.primary().port();
    for reach in [Reach::Tree, Reach::Parent] {
        let processes = procfs::descendants(cluster.primary().pid().unwrap());
        assert!(processes.len() > 3, "the backends are found");
        cluster.primary_mut().kill9(reach).await.unwrap();
        assert!(processes.iter().all(|pid| !procfs::lives(*pid)));
        cluster.primary_mut().start().await.unwrap();
        cluster.wait_synchronous().await.unwrap();
        assert_eq!(cluster.primary().port(), port);
        let db = cluster.connect(Role::Owner).await.unwrap();
        let count: i64 = db.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get(0);
        assert_eq!(count, 1000);
    }
}

#[tokio::test]
async fn a_paused_primary_answers_nothing_until_it_is_resumed() {
    let scratch = Scratch::new().unwrap();
    let mut cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let db = cluster.connect(Role::Owner).await.unwrap();
    cluster.primary_mut().pause(Reach::Tree);
    let query = db.query_one("SELECT 1", &[]);
    tokio::pin!(query);
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut query).await.is_err());
    cluster.primary_mut().resume();
    tokio::time::timeout(PATIENCE, query).await.expect("answers again").unwrap();

    // The postmaster alone: open sessions go on, new ones hang.
    cluster.primary_mut().pause(Reach::Parent);
    db.query_one("SELECT 1", &[]).await.unwrap();
    let refused = tokio::time::timeout(Duration::from_secs(4), cluster.connect(Role::Owner)).await;
    assert!(refused.is_err(), "hangs instead of being refused");
    cluster.primary_mut().resume();
    cluster.connect(Role::Owner).await.unwrap();
}

#[tokio::test]
async fn the_broker_restarts_on_its_port_and_is_refused_when_dead() {
    let scratch = Scratch::new().unwrap();
    let mut broker = Mosquitto::start(&scratch, &[]).await.unwrap();
    let port = broker.port();
    broker.restart().await.unwrap();
    broker.kill9().await.unwrap();
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err());
    broker.start_again().await.unwrap();
    assert_eq!(broker.port(), port);
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let scratch = Scratch::new().unwrap();
    let error = Mosquitto::start(&scratch, &["no_such_option true"]).await.unwrap_err();
    assert!(format!("{error:#}").contains("no_such_option"), "{error:#}");
}

/// Shared memory outlives processes; a hundred tests would fill the machine's.
#[tokio::test]
async fn servers_leave_no_shared_memory_behind() {
    let scratch = Scratch::new().unwrap();
    let mut cluster = Cluster::start(&scratch, Options::default()).await.unwrap();
    let mut mapped = Vec::new();
    for node in &cluster.nodes {
        mapped.extend(procfs::mapped(node.pid().unwrap(), "/dev/shm/PostgreSQL."));
    }
    assert!(mapped.len() >= 2 && mapped.iter().all(|path| path.exists()), "{mapped:?}");
    // One killed, one running when dropped.
    cluster.standby_mut().kill9(Reach::Tree).await.unwrap();
    drop(cluster);
    assert!(mapped.iter().all(|path| !path.exists()), "{mapped:?}");
}
