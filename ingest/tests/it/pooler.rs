//! Behind a connection pooler: in session mode everything is as without one, in the other modes it is refused in words.

use ingest::database::Database;
use ingest::settings::DatabaseSettings;
use playground::cluster::{Cluster, Options};
use playground::pgbouncer::Pgbouncer;
use playground::postgres::Role;
use playground::scratch::Scratch;
use service::health::Health;
use service::secret::Secret;

use crate::fixture::{connected, try_connected};
use crate::settings::road::{REFUSE_ONE_DEVICE, Road};

/// What a DBA may have set, and what our sessions must have all the same.
const HOSTILE: [(&str, &str); 4] = [
    ("synchronous_commit", "off"),
    ("client_min_messages", "error"),
    ("search_path", "pg_catalog"),
    ("DateStyle", "German, DMY"),
];

struct Site {
    cluster: Cluster,
    scratch: Scratch,
}

impl Site {
    async fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
        let site = Self { cluster, scratch };
        let database = site.database(site.cluster.primary().port(), &Health::default());
        ingest::schema::migrate(&mut *connected(&database).await).await.unwrap();
        let admin = site.cluster.primary().connect(Role::Admin).await.unwrap();
        admin.batch_execute(REFUSE_ONE_DEVICE).await.unwrap();
        for (name, value) in HOSTILE {
            let value = if name == "DateStyle" { value.to_owned() } else { format!("'{value}'") };
            admin.batch_execute(&format!("ALTER ROLE tier0 SET {name} = {value}")).await.unwrap();
        }
        site
    }

    fn database(&self, port: u16, health: &Health) -> Database {
        let settings = DatabaseSettings {
            hosts: format!("127.0.0.1:{port}"),
            password: Secret::new(self.cluster.primary().passwords().of(Role::Owner)),
            ..DatabaseSettings::default()
        };
        Database::new(&settings, 3, health.dependency("postgres")).unwrap()
    }
}

/// A pooler that refuses the start-up parameter `options`, which is what it does unless told otherwise; and one that drops it.
#[tokio::test]
async fn a_pooler_in_session_mode_is_as_good_as_none() {
    let site = Site::new().await;
    let admin = site.cluster.primary().connect(Role::Admin).await.unwrap();
    for (number, extra) in [(1, None), (2, Some("ignore_startup_parameters = options"))] {
        let lines: Vec<&str> = ["pool_mode = session"].into_iter().chain(extra).collect();
        let pooler = Pgbouncer::start(&site.scratch, site.cluster.primary(), &lines).await.unwrap();
        let database = site.database(pooler.port(), &Health::default());
        let client = connected(&database).await;
        for (name, hostile) in HOSTILE {
            let sql = format!("SELECT current_setting('{name}')");
            let value: String = client.query_one(&sql, &[]).await.unwrap().get(0);
            let wanted = wire::postgres::SETTINGS.iter().find(|setting| setting.name == name).unwrap().value;
            assert_eq!(value, wanted, "{name}, {lines:?}");
            assert_ne!(value, hostile);
        }
        drop(client);
        Road::new(number, &database, &admin).walk().await.unwrap();
    }
}

#[tokio::test]
async fn a_pooler_in_another_mode_is_refused_in_words() {
    let site = Site::new().await;
    for mode in ["pool_mode = transaction", "pool_mode = statement"] {
        for extra in ["ignore_startup_parameters = options", "max_client_conn = 100"] {
            let pooler =
                Pgbouncer::start(&site.scratch, site.cluster.primary(), &[mode, extra]).await.unwrap();
            let health = Health::default();
            let database = site.database(pooler.port(), &health);
            let refused = try_connected(&database).await.unwrap_err();
            assert!(refused.contains("pool_mode = session"), "{mode}, {extra}: {refused}");
            assert_eq!(health.failing()["postgres"], refused);
        }
    }
}
