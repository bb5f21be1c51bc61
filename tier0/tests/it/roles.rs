//! Who may do what in the playground's Postgres: what a deployment allows, and nothing else.

use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role};
use playground::scratch::Scratch;
use tokio_postgres::error::SqlState;

const ROW: &str = "INSERT INTO site_activity VALUES ('a', now(), '{}')";
const LETTER: &str = "INSERT INTO dead_letters (received_at, source, topic, reason, error, payload) \
                      VALUES (now(), 's', 't', 'not_json', 'e', '')";

/// Whether a statement goes through; refused for another reason than missing rights is a failure of the test.
async fn may(db: &Db, sql: &str) -> bool {
    let Err(error) = db.batch_execute(sql).await else { return true };
    drop(db.batch_execute("ROLLBACK").await);
    let code = error.code().unwrap_or_else(|| panic!("{sql}: {error}"));
    let refusals = [SqlState::INSUFFICIENT_PRIVILEGE, SqlState::READ_ONLY_SQL_TRANSACTION];
    assert!(refusals.contains(code), "{sql}: refused for another reason: {error}");
    false
}

#[tokio::test]
async fn each_role_may_do_what_is_its_own() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let mut owner = cluster.connect(Role::Owner).await.unwrap();
    ingest::schema::migrate(&mut owner).await.unwrap();
    let writer = cluster.connect(Role::Writer).await.unwrap();
    let reader = cluster.connect(Role::Reader).await.unwrap();
    let monitor = cluster.connect(Role::Monitor).await.unwrap();
    let merge = "CREATE TEMP TABLE staging (LIKE user_sessions); DROP TABLE staging";
    let make = "CREATE TABLE p (LIKE sites); DROP TABLE p";
    // Read only is a default, which a session may end; rights it may not.
    let insist = format!("SET default_transaction_read_only = off; {ROW}");
    for (db, who, sql, allowed) in [
        (&owner, "tier0", make, true),
        (&owner, "tier0", ROW, true),
        (&owner, "tier0", LETTER, true),
        (&writer, "writer", ROW, true),
        (&writer, "writer", LETTER, true),
        (&writer, "writer", "UPDATE site_activity SET metrics = '{}'", true),
        (&writer, "writer", merge, true),
        (&writer, "writer", "DELETE FROM site_activity", false),
        (&writer, "writer", "TRUNCATE site_activity", false),
        (&writer, "writer", make, false),
        (&writer, "writer", "DROP TABLE sites", false),
        (&reader, "reader", "SELECT count(*) FROM device_telemetry", true),
        (&reader, "reader", "SELECT count(*) FROM dead_letters", true),
        (&reader, "reader", ROW, false),
        (&reader, "reader", &insist, false),
        (&reader, "reader", make, false),
        (&monitor, "monitor", "SELECT count(*) FROM pg_stat_replication", true),
        (&monitor, "monitor", "SELECT count(*) FROM device_telemetry", false),
        (&monitor, "monitor", "SELECT count(*) FROM user_sessions", false),
        (&monitor, "monitor", &insist, false),
    ] {
        assert_eq!(may(db, sql).await, allowed, "{who}: {sql}");
    }
    for (db, who) in [(&owner, "tier0"), (&writer, "writer"), (&reader, "reader"), (&monitor, "monitor")] {
        for sql in [
            "SELECT count(*) FROM pg_authid",
            "CREATE ROLE other",
            "ALTER ROLE postgres PASSWORD 'x'",
            "CREATE DATABASE other",
            "COPY (SELECT 1) TO PROGRAM 'true'",
            "SELECT pg_read_file('PG_VERSION')",
        ] {
            assert!(!may(db, sql).await, "{who} may: {sql}");
        }
        let sql = "SELECT rolsuper OR rolreplication OR rolbypassrls FROM pg_roles WHERE rolname = $1";
        let row = db.query_one(sql, &[&who]).await.unwrap();
        assert!(!row.get::<_, bool>(0), "{who}");
    }
}

#[tokio::test]
async fn no_role_gets_into_a_database_that_is_not_its_own() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let node = cluster.primary();
    let admin = node.admin().await.unwrap();
    // As another application on the same server would have it.
    admin.batch_execute("CREATE DATABASE another").await.unwrap();
    admin.batch_execute("REVOKE CONNECT ON DATABASE another FROM PUBLIC").await.unwrap();
    for (role, database, allowed) in [
        (Role::Owner, "tier0_db", true),
        (Role::Owner, "postgres", false),
        (Role::Owner, "template1", false),
        (Role::Owner, "another", false),
        (Role::Writer, "tier0_db", true),
        (Role::Writer, "postgres", false),
        (Role::Writer, "another", false),
        (Role::Reader, "tier0_db", true),
        (Role::Reader, "postgres", false),
        (Role::Reader, "another", false),
        (Role::Monitor, "tier0_db", true),
        (Role::Monitor, "postgres", true),
        (Role::Monitor, "another", false),
        (Role::Replicator, "tier0_db", false),
        (Role::Replicator, "postgres", true),
    ] {
        let mut config = node.config(role);
        let entered = playground::postgres::connect(config.dbname(database)).await;
        assert_eq!(entered.is_ok(), allowed, "{} into {database}: {entered:?}", role.name());
    }
}
