//! A database that Tier0 cannot keep its promise in, or may not work in: each is said in one sentence that says what to do.

use std::time::Duration;

use ingest::database::Database;
use ingest::schema::{self, Purpose};
use ingest::settings::DatabaseSettings;
use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role};
use playground::scratch::Scratch;
use service::health::Health;
use service::secret::Secret;
use tokio::time::{Instant, sleep};

use crate::drift::until;
use crate::fixture::{PATIENCE, connected, try_connected};

struct Site {
    cluster: Cluster,
    _scratch: Scratch,
}

impl Site {
    async fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
        Self { cluster, _scratch: scratch }
    }

    fn settings(&self, role: Role) -> DatabaseSettings {
        DatabaseSettings {
            hosts: format!("127.0.0.1:{}", self.cluster.primary().port()),
            user: role.name().into(),
            password: Secret::new(self.cluster.primary().passwords().of(role)),
            ..DatabaseSettings::default()
        }
    }

    /// The words with which a session is refused; health says the same.
    async fn refusal(&self, settings: &DatabaseSettings) -> String {
        let health = Health::default();
        let database = Database::new(settings, 2, health.dependency("postgres")).unwrap();
        let refused = try_connected(&database).await.unwrap_err();
        assert_eq!(health.failing()["postgres"], refused);
        refused
    }

    async fn admin(&self) -> Db {
        self.cluster.primary().connect(Role::Admin).await.unwrap()
    }
}

fn assert_has(words: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| words.contains(part)), "{parts:?} are not all in: {words}");
}

#[tokio::test]
async fn a_database_of_another_encoding_is_refused() {
    let site = Site::new().await;
    let admin = site.admin().await;
    for encoding in ["LATIN1", "SQL_ASCII", "EUC_JP"] {
        let name = format!("in_{}", encoding.to_lowercase());
        let sql =
            format!("CREATE DATABASE {name} OWNER tier0 ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'");
        admin.batch_execute(&sql).await.unwrap();
        let settings = DatabaseSettings { name: name.clone(), ..site.settings(Role::Owner) };
        assert_has(&site.refusal(&settings).await, &[&name, encoding, "ENCODING 'UTF8'", "database.name"]);
    }
}

#[tokio::test]
async fn whoever_is_not_let_in_is_told_what_to_check() {
    let site = Site::new().await;
    let admin = site.admin().await;
    let owner = || site.settings(Role::Owner);
    let wrong_password = DatabaseSettings { password: Secret::new("wrong"), ..owner() };
    assert_has(&site.refusal(&wrong_password).await, &["28P01", "database.password"]);
    let nobody = DatabaseSettings { user: "nobody".into(), ..owner() };
    assert_has(&site.refusal(&nobody).await, &["nobody", "database.user"]);
    let nowhere = DatabaseSettings { name: "nowhere".into(), ..owner() };
    assert_has(&site.refusal(&nowhere).await, &["nowhere", "3D000", "database.name"]);
    // pg_hba.conf rejects this role for this database.
    assert_has(&site.refusal(&site.settings(Role::Replicator)).await, &["28000", "pg_hba.conf"]);
    admin.batch_execute("REVOKE CONNECT ON DATABASE tier0_db FROM writer").await.unwrap();
    assert_has(&site.refusal(&site.settings(Role::Writer)).await, &["42501", "GRANT CONNECT"]);
    admin.batch_execute("ALTER ROLE tier0 CONNECTION LIMIT 0").await.unwrap();
    assert_has(&site.refusal(&owner()).await, &["53300", "CONNECTION LIMIT"]);
    admin.batch_execute("ALTER ROLE tier0 CONNECTION LIMIT -1 NOLOGIN").await.unwrap();
    assert_has(&site.refusal(&owner()).await, &["28000", "database.user"]);
}

/// Not a role's setting but the whole server's.
#[tokio::test]
async fn a_server_that_does_not_flush_is_refused() {
    let site = Site::new().await;
    let admin = site.admin().await;
    admin.batch_execute("ALTER SYSTEM SET fsync = off").await.unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while admin.query_one("SHOW fsync", &[]).await.unwrap().get::<_, &str>(0) != "off" {
        assert!(Instant::now() < deadline, "the server reads its configuration");
        sleep(Duration::from_millis(5)).await;
    }
    assert_has(&site.refusal(&site.settings(Role::Owner)).await, &["fsync is off", "postgresql.conf"]);
}

/// What a DBA may do to the tables, whose work it stops, and what the sentence names. The statement after "run" mends it.
const ACTS: &[(&str, Purpose, &[&str])] = &[
    ("REVOKE INSERT ON device_telemetry FROM tier0", Purpose::Telemetry, &["tier0 lacks INSERT", "GRANT"]),
    ("REVOKE UPDATE, SELECT ON user_sessions FROM writer", Purpose::Sessions, &["SELECT, UPDATE", "GRANT"]),
    (
        "REVOKE INSERT ON dead_letters FROM writer",
        Purpose::Sessions,
        &["lacks INSERT on public.dead_letters"],
    ),
    (
        "REVOKE SELECT ON dead_letter_storage FROM writer",
        Purpose::Sessions,
        &["lacks SELECT on public.dead_letter_storage", "GRANT"],
    ),
    ("REVOKE TEMPORARY ON DATABASE tier0_db FROM writer", Purpose::Sessions, &["temporary tables", "GRANT"]),
    ("REVOKE USAGE ON SCHEMA public FROM writer", Purpose::Sessions, &["may not use schema public", "GRANT"]),
    ("REVOKE SELECT ON refinery_schema_history FROM writer", Purpose::Sessions, &["may not read", "GRANT"]),
    (
        "ALTER TABLE user_sessions ENABLE ROW LEVEL SECURITY",
        Purpose::Sessions,
        &["row-level security", "DISABLE"],
    ),
    (
        "ALTER TABLE device_telemetry OWNER TO postgres; GRANT ALL ON device_telemetry TO tier0",
        Purpose::Telemetry,
        &["does not own", "OWNER TO tier0"],
    ),
];

/// As [`ACTS`], but what mends it is a decision of somebody who knows why it was done.
const CHANGES: &[(&str, &str, &[&str])] = &[
    (
        "ALTER TABLE user_sessions RENAME TO old_sessions",
        "ALTER TABLE old_sessions RENAME TO user_sessions",
        &["public.user_sessions is missing", "renamed or dropped"],
    ),
    (
        "ALTER TABLE site_activity ALTER metrics TYPE text",
        "ALTER TABLE site_activity ALTER metrics TYPE jsonb USING metrics::jsonb",
        &["column metrics is text, not jsonb"],
    ),
    (
        "ALTER TABLE site_activity ADD rank int NOT NULL",
        "ALTER TABLE site_activity DROP rank",
        &["column rank is NOT NULL without a default"],
    ),
    (
        "ALTER TABLE dead_letters RENAME topic TO subject",
        "ALTER TABLE dead_letters RENAME subject TO topic",
        &["column topic is missing"],
    ),
    (
        "ALTER TABLE dead_letters ADD extra int NOT NULL",
        "ALTER TABLE dead_letters DROP extra",
        &["column extra is NOT NULL without a default"],
    ),
    (
        "INSERT INTO refinery_schema_history VALUES (99, 'later', '2026-01-01T00:00:00Z', '1')",
        "DELETE FROM refinery_schema_history WHERE version = 99",
        &["version 99", "newer program"],
    ),
];

#[tokio::test]
async fn a_missing_right_or_a_changed_table_is_named_with_what_mends_it() {
    let site = Site::new().await;
    let admin = site.admin().await;
    let open = async |role: Role| {
        let health = Health::default().dependency("postgres");
        connected(&Database::new(&site.settings(role), 2, health).unwrap()).await
    };
    let (mut owner, writer) = (open(Role::Owner).await, open(Role::Writer).await);
    let unmade = schema::check(&owner, Purpose::Telemetry).await.unwrap_err();
    assert_has(&format!("{unmade:#}"), &["no migration was applied", "mqtt_consumer.migrate"]);
    schema::migrate(&mut owner).await.unwrap();
    let check = async |purpose: Purpose| match purpose {
        Purpose::Telemetry => schema::check(&owner, purpose).await,
        Purpose::Sessions => schema::check(&writer, purpose).await,
    };
    for purpose in [Purpose::Telemetry, Purpose::Sessions] {
        check(purpose).await.unwrap();
    }
    for (act, purpose, parts) in ACTS {
        admin.batch_execute(act).await.unwrap();
        let words = format!("{:#}", check(*purpose).await.expect_err(act));
        assert_has(&words, parts);
        let (_, mend) = words.split_once(": run ").unwrap_or_else(|| panic!("nothing to run: {words}"));
        admin.batch_execute(mend).await.unwrap_or_else(|error| panic!("{mend}: {error}"));
        check(*purpose).await.unwrap_or_else(|error| panic!("after {mend}: {error:#}"));
    }
    for (act, undo, parts) in CHANGES {
        admin.batch_execute(act).await.unwrap();
        assert_has(&format!("{:#}", check(Purpose::Sessions).await.expect_err(act)), parts);
        admin.batch_execute(undo).await.unwrap();
        check(Purpose::Sessions).await.unwrap_or_else(|error| panic!("after {undo}: {error:#}"));
    }
}

/// A newer program has migrated; a program of another product has tables of the same names; a record was lost; the role may
/// make no tables; tables that an older program put into a schema named as the role.
#[tokio::test]
async fn a_schema_that_cannot_be_brought_up_to_date_is_refused_in_words() {
    let site = Site::new().await;
    let admin = site.admin().await;
    let health = Health::default().dependency("postgres");
    let database = Database::new(&site.settings(Role::Owner), 2, health).unwrap();
    let mut client = connected(&database).await;
    admin.batch_execute("ALTER SCHEMA public OWNER TO postgres").await.unwrap();
    let error = schema::migrate(&mut client).await.unwrap_err();
    assert_has(&format!("{error:#}"), &["tier0 may not make tables", "GRANT USAGE, CREATE ON SCHEMA public"]);
    admin.batch_execute("ALTER SCHEMA public OWNER TO tier0").await.unwrap();

    let old = "CREATE SCHEMA tier0 AUTHORIZATION tier0; \
               CREATE TABLE tier0.device_telemetry (timestamp_utc timestamptz) PARTITION BY RANGE (timestamp_utc)";
    admin.batch_execute(old).await.unwrap();
    let error = schema::migrate(&mut client).await.unwrap_err();
    assert_has(&format!("{error:#}"), &["schema tier0, not in public", "SET SCHEMA public"]);
    admin.batch_execute("DROP SCHEMA tier0 CASCADE").await.unwrap();

    schema::migrate(&mut client).await.unwrap();
    let later = "INSERT INTO refinery_schema_history VALUES (99, 'later', '2026-01-01T00:00:00Z', '1')";
    admin.batch_execute(later).await.unwrap();
    let error = schema::migrate(&mut client).await.unwrap_err();
    assert_has(&format!("{error:#}"), &["version 99", "newer program"]);
    admin.batch_execute("DELETE FROM refinery_schema_history WHERE version = 99").await.unwrap();
    admin.batch_execute("UPDATE refinery_schema_history SET checksum = '1' WHERE version = 1").await.unwrap();
    let error = schema::migrate(&mut client).await.unwrap_err();
    assert_has(&format!("{error:#}"), &["migration 1", "another program or by a changed migration"]);
    // The lock is given back after each of these, or this would wait for ever.
    let free = "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'";
    until("the lock is free", async || admin.query_one(free, &[]).await.unwrap().get(0)).await;
}
