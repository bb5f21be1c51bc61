//! Whatever a DBA sets for our role or database: what is stored is exactly what was sent, or the session is refused with a
//! sentence that names the setting.
//!
//! Every setting that `ALTER ROLE .. SET` and `ALTER DATABASE .. SET` take is set to hostile values in turn, and the main road
//! is walked with fresh sessions.

pub(crate) mod road;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ingest::database::Database;
use ingest::schema::{self, Purpose};
use ingest::settings::DatabaseSettings;
use playground::cluster::{Cluster, Options};
use playground::postgres::{Db, Role, connect};
use playground::scratch::Scratch;
use service::health::Health;
use service::secret::Secret;
use tokio::task::JoinSet;

use road::Road;
use values::{Setting, hostile};

use crate::fixture::connected;

/// As many roads are walked at once, each with a role and a database of its own: settings of one do not reach the other.
const LANES: usize = 3;
const PASSWORD: &str = "of-a-lane";

/// The hostile value is one that nobody can mend from within a session: the words by which it is refused. Everything else
/// must be stored exactly.
const REFUSED: &[(&str, &str, &str)] = &[
    ("zero_damaged_pages", "on", "zero_damaged_pages is on"),
    ("ignore_checksum_failure", "on", "ignore_checksum_failure is on"),
    ("session_preload_libraries", "no_such_library", "session_preload_libraries"),
];

/// A role, a database that belongs to it, and a way in that no hostile setting reaches.
struct Lane {
    role: String,
    settings: DatabaseSettings,
    admin: Db,
}

impl Lane {
    async fn new(cluster: &Cluster, number: usize) -> Self {
        let role = format!("lane{number}");
        let admin = cluster.primary().admin().await.unwrap();
        for sql in [
            format!("CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'"),
            format!("GRANT other TO {role}"),
            format!("CREATE DATABASE {role} OWNER {role}"),
        ] {
            admin.batch_execute(&sql).await.unwrap();
        }
        let mut config = cluster.primary().config(Role::Admin);
        config.dbname(&role);
        let admin = connect(&config).await.unwrap();
        admin.batch_execute(&format!("ALTER SCHEMA public OWNER TO {role}")).await.unwrap();
        let settings = DatabaseSettings {
            hosts: format!("127.0.0.1:{}", cluster.primary().port()),
            name: role.clone(),
            user: role.clone(),
            password: Secret::new(PASSWORD),
            ..DatabaseSettings::default()
        };
        let lane = Self { role, settings, admin };
        let database = lane.database();
        let mut client = connected(&database).await;
        schema::migrate(&mut client).await.unwrap();
        lane.admin.batch_execute(&decoys(&lane.role)).await.unwrap();
        lane.admin.batch_execute(road::REFUSE_ONE_DEVICE).await.unwrap();
        lane
    }

    fn database(&self) -> Database {
        Database::new(&self.settings, 2, Health::default().dependency("postgres")).unwrap()
    }

    /// Who gets the setting: each of the three kinds in turn.
    fn target(&self, number: usize) -> String {
        let role = &self.role;
        match number % 3 {
            0 => format!("ROLE {role}"),
            1 => format!("DATABASE {role}"),
            _ => format!("ROLE {role} IN DATABASE {role}"),
        }
    }
}

/// Empty tables of the same names where a search path may lead: in a schema named as the role, and in one of no meaning.
fn decoys(role: &str) -> String {
    let tables = ["device_telemetry", "dead_letters", "user_sessions", "site_activity"];
    let make = |schema: &str| {
        let each = tables.iter().map(|table| format!("CREATE TABLE {schema}.{table} (LIKE public.{table});"));
        format!("CREATE SCHEMA {schema} AUTHORIZATION {role}; {}", each.collect::<String>())
    };
    // Under the names of our temporary tables, where they would be found first.
    let staging = "CREATE TABLE public.telemetry_staging (LIKE public.device_telemetry); \
                   CREATE TABLE public.session_staging (LIKE public.user_sessions);";
    format!("{}{}{staging}", make(role), make("decoy"))
}

/// One setting, one value.
#[derive(Debug, Clone)]
struct Case {
    number: usize,
    setting: String,
    value: String,
}

/// What became of a case.
enum Outcome {
    Exact,
    /// The server takes no such value for a role.
    NotTaken,
    Refused(String),
}

async fn walk(lane: &Lane, case: &Case) -> Outcome {
    let target = lane.target(case.number);
    let set = format!("ALTER {target} SET {} = {}", case.setting, values::quoted(&case.setting, &case.value));
    if lane.admin.batch_execute(&set).await.is_err() {
        return Outcome::NotTaken;
    }
    let database = lane.database();
    let walked = Road::new(case.number, &database, &lane.admin).walk().await;
    drop(database);
    lane.admin.batch_execute(&format!("ALTER {target} RESET {}", case.setting)).await.unwrap();
    match walked {
        Ok(()) => Outcome::Exact,
        Err(words) => Outcome::Refused(words),
    }
}

/// Every setting a role can have, with the values that differ most from what it is.
async fn cases(admin: &Db) -> Vec<Case> {
    let rows = admin
        .query(
            "SELECT name, vartype, enumvals, min_val, max_val, setting FROM pg_settings \
             WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') ORDER BY name",
            &[],
        )
        .await
        .unwrap();
    let mut settings: Vec<Setting> = rows.iter().map(Setting::read).collect();
    // In no list of the server's, and taken all the same.
    settings.extend(["role", "session_authorization"].map(Setting::unlisted));
    assert!(settings.len() > 150, "a server has more than {} settings", settings.len());
    let values = settings
        .iter()
        .flat_map(|setting| hostile(setting).into_iter().map(|value| (setting.name.clone(), value)));
    values.enumerate().map(|(number, (setting, value))| Case { number, setting, value }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_setting_of_role_or_database_changes_what_is_stored() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let admin = cluster.primary().admin().await.unwrap();
    admin.batch_execute("CREATE ROLE other").await.unwrap();
    let cases = Arc::new(cases(&admin).await);
    let next = Arc::new(AtomicUsize::new(0));
    let mut lanes = JoinSet::new();
    for number in 0..LANES {
        let lane = Lane::new(&cluster, number).await;
        let (cases, next) = (cases.clone(), next.clone());
        lanes.spawn(async move {
            let mut outcomes = Vec::new();
            while let Some(case) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                outcomes.push((case.clone(), walk(&lane, case).await));
            }
            outcomes
        });
    }
    let outcomes: Vec<(Case, Outcome)> = lanes.join_all().await.into_iter().flatten().collect();
    assert_eq!(outcomes.len(), cases.len());

    let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
    let mut refused = BTreeSet::new();
    let mut wrong = Vec::new();
    for (case, outcome) in &outcomes {
        let count = taken.entry(&case.setting).or_default();
        let (setting, value) = (case.setting.as_str(), case.value.as_str());
        let expected = REFUSED.iter().find(|(of, at, _)| (*of, *at) == (setting, value));
        match (outcome, expected) {
            (Outcome::NotTaken, _) => continue,
            (Outcome::Exact, None) => {}
            (Outcome::Exact, Some(_)) => wrong.push(format!("{setting} = {value}: not refused")),
            (Outcome::Refused(words), Some((_, _, part))) if words.contains(part) => {
                refused.insert(setting);
            }
            (Outcome::Refused(words), _) => wrong.push(format!("{setting} = {value}: {words}")),
        }
        *count += 1;
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), outcomes.len(), wrong.join("\n"));
    assert_eq!(refused.len(), REFUSED.len(), "{refused:?}");
    let untried: Vec<&str> = taken.iter().filter(|(_, count)| **count == 0).map(|(name, _)| *name).collect();
    assert_eq!(untried, values::NEVER_TAKEN, "settings of which the server took no hostile value");
}

/// The role's own schema existed before the tables: today's default search path would make and use a second set there.
#[tokio::test]
async fn a_schema_named_as_the_role_gets_no_tables() {
    let scratch = Scratch::new().unwrap();
    let cluster = Cluster::start(&scratch, Options::alone()).await.unwrap();
    let admin = cluster.primary().connect(Role::Admin).await.unwrap();
    admin.batch_execute("CREATE SCHEMA tier0 AUTHORIZATION tier0").await.unwrap();
    let settings = DatabaseSettings {
        hosts: format!("127.0.0.1:{}", cluster.primary().port()),
        password: Secret::new(cluster.primary().passwords().of(Role::Owner)),
        ..DatabaseSettings::default()
    };
    let database = Database::new(&settings, 2, Health::default().dependency("postgres")).unwrap();
    let mut client = connected(&database).await;
    schema::migrate(&mut client).await.unwrap();
    schema::check(&client, Purpose::Telemetry).await.unwrap();
    let strays = "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'tier0'";
    assert_eq!(admin.query_one(strays, &[]).await.unwrap().get::<_, i64>(0), 0);
}
