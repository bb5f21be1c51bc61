//! The main road: readings, duplicates, letters, a refused row, a late reading, partitions, sessions. What is in the tables
//! afterwards is compared with what was sent.

use std::time::Duration;

use bytes::Bytes;
use ingest::batch::{Batch as _, Path};
use ingest::database::Database;
use ingest::delivery::{Ack, Delivery};
use ingest::failure::WriteError;
use ingest::partitions::{self, Table};
use ingest::reading::Rules;
use ingest::settings::IngestSettings;
use ingest::telemetry::Memory;
use ingest::{session, telemetry};
use playground::postgres::Db;
use tokio::time::Instant;

use crate::fixture::{layout, session_rules, try_connected};

const PATIENCE: Duration = Duration::from_secs(60);
const FRESH: usize = 20;
const MINUTE: i64 = 60_000_000;

/// What the decoder takes and the database does not.
pub(crate) const REFUSE_ONE_DEVICE: &str =
    "ALTER TABLE public.device_telemetry ADD CONSTRAINT refused CHECK (device_id NOT LIKE '%-refused')";

/// One walk. Its ids hold its number, so that many walks share the tables.
pub(crate) struct Road<'r> {
    number: usize,
    database: &'r Database,
    /// Sees the tables by no setting of ours.
    admin: &'r Db,
    now_us: i64,
}

/// Commits a sealed batch as a writer does: the fast path first, then whatever the error asks for.
///
/// # Errors
/// The words with which it was refused; a writer would try again.
pub(crate) async fn commit(database: &Database, batch: &mut telemetry::Batch) -> Result<(), String> {
    let mut client = try_connected(database).await?;
    let mut path = Path::Fast;
    for _ in 0..6 {
        match batch.commit(&mut client, path, PATIENCE).await {
            Ok(_) => return Ok(()),
            Err(WriteError::Duplicate | WriteError::Swallowed { .. }) => path = Path::Merge,
            Err(WriteError::Data { .. }) => path = Path::Isolate,
            Err(WriteError::MissingPartition) => {
                let needed = layout().cells(batch.timestamps());
                let made = partitions::ensure(&mut client, &layout(), &needed).await;
                made.map_err(|error| format!("make a partition: {error}"))?;
            }
            Err(error) => {
                database.discard(client, "outcome unknown");
                return Err(format!("commit: {error}"));
            }
        }
    }
    database.discard(client, "not committed");
    Err(format!("still not committed on path {path:?}"))
}

impl<'r> Road<'r> {
    pub(crate) fn new(number: usize, database: &'r Database, admin: &'r Db) -> Self {
        Self { number, database, admin, now_us: jiff::Timestamp::now().as_microsecond() }
    }

    /// Walks it.
    ///
    /// # Errors
    /// The words with which a step was refused. What is stored and not what was sent is a panic.
    pub(crate) async fn walk(&self) -> Result<(), String> {
        self.partitions_come_and_go().await?;
        let mut recent = memory();
        let mut batch = self.batch();
        for device in 0..FRESH {
            self.push(&mut batch, &mut recent, &device.to_string(), 0);
        }
        self.push(&mut batch, &mut recent, "refused", 0);
        self.push(&mut batch, &mut recent, "late", self.late_us());
        batch.push(self.delivery("broken", "not json".into()), self.now_us, &mut recent);
        self.commit(&mut batch).await?;

        // Some of them again, found out by the table; then by the memory of what was seen.
        for (mut recent, from) in [(memory(), FRESH), (recent, FRESH + 5)] {
            let mut batch = self.batch();
            for device in (0..FRESH).step_by(2).chain(from..from + 5) {
                self.push(&mut batch, &mut recent, &device.to_string(), 0);
            }
            self.commit(&mut batch).await?;
        }
        self.sessions().await?;
        self.compare().await;
        Ok(())
    }

    fn batch(&self) -> telemetry::Batch {
        telemetry::Batch::new("mqtt", self.rules())
    }

    fn rules(&self) -> Rules {
        let (oldest_us, newest_us) = layout().window(self.now_us);
        Rules::new(oldest_us, newest_us, 1 << 20)
    }

    /// In a minute that no other walk uses.
    fn late_us(&self) -> i64 {
        -3 * 60 * MINUTE - i64::try_from(self.number).unwrap() * MINUTE
    }

    fn id(&self, device: &str) -> String {
        format!("D{}-{device}", self.number)
    }

    fn delivery(&self, device: &str, payload: String) -> Delivery {
        let topic = Bytes::from(format!("og/field/S/turbine/{}", self.id(device)));
        let ack = Some(Ack { connection: 1, id: 1 });
        Delivery::new(topic, Bytes::from(payload), ack, Instant::now())
    }

    fn push(&self, batch: &mut telemetry::Batch, recent: &mut Memory, device: &str, after_us: i64) {
        let time = jiff::Timestamp::from_microsecond(self.now_us + after_us).unwrap();
        let payload = format!(
            r#"{{"device_id":"{}","device_type":"turbine","site_id":"S","timestamp_utc":"{time}","metrics":{METRICS},"firmware":"é\\'1"}}"#,
            self.id(device)
        );
        batch.push(self.delivery(device, payload), self.now_us, recent);
    }

    async fn commit(&self, batch: &mut telemetry::Batch) -> Result<(), String> {
        batch.seal();
        commit(self.database, batch).await
    }

    async fn partitions_come_and_go(&self) -> Result<(), String> {
        let mut client = try_connected(self.database).await?;
        // Empty, and older than any reading of a walk.
        let old = layout().cells([self.now_us + self.late_us() - 8 * 60 * MINUTE].into_iter());
        let now = layout().cells([self.now_us].into_iter());
        let cells: Vec<i64> = old.iter().chain(&now).copied().collect();
        let walked = async {
            partitions::ensure(&mut client, &layout(), &cells).await?;
            let found = |list: &[partitions::Partition]| {
                list.iter().find(|partition| Some(&partition.span.0) == old.first()).cloned()
            };
            let partition = found(&partitions::list(&client, Table::DeviceTelemetry).await?.partitions)
                .expect("it was made");
            partitions::index_device(&client, &partition).await?;
            assert!(
                found(&partitions::list(&client, Table::DeviceTelemetry).await?.partitions)
                    .expect("it was made")
                    .indexed
            );
            partitions::drop_expired(&client, Table::DeviceTelemetry, &partition, None).await?;
            partitions::finish_drops(&client, Table::DeviceTelemetry).await?;
            assert_eq!(found(&partitions::list(&client, Table::DeviceTelemetry).await?.partitions), None);
            Ok(())
        };
        walked.await.map_err(|error: WriteError| format!("partitions: {error}"))
    }

    async fn sessions(&self) -> Result<(), String> {
        let mut client = try_connected(self.database).await?;
        for (event, second) in [("login", 1), ("active", 3), ("logout", 9), ("idle", 4)] {
            let mut batch = session::Batch::new("rabbitmq", session_rules());
            let number = self.number;
            let event = format!(
                r#"{{"event":"{event}","timestamp":"2026-02-03T04:05:0{second}.000001Z","session_id":"S{number}","user_id":"u{number}",
                "username":"é","connection_status":"{}"}}"#,
                if event == "logout" { "disconnected" } else { "active" }
            );
            let report = format!(
                r#"{{"site_id":"W{number}","timestamp_utc":"2026-02-03T04:05:06Z","metrics":{METRICS},"active_users_list":[]}}"#
            );
            for payload in [event, report] {
                batch.push(
                    self.delivery("queue", payload),
                    self.now_us,
                    &mut session::Batch::memory(&IngestSettings::default()),
                );
            }
            batch.seal();
            let committed = batch.commit(&mut client, Path::Fast, PATIENCE).await;
            committed.map_err(|error| format!("sessions: {error}"))?;
        }
        Ok(())
    }

    async fn compare(&self) {
        let mut sent: Vec<(String, i64)> =
            (0..FRESH + 10).map(|device| (self.id(&device.to_string()), self.now_us)).collect();
        sent.push((self.id("late"), self.now_us + self.late_us()));
        sent.sort_unstable();
        let rows = self.read(
            "SELECT device_id, (extract(epoch FROM timestamp_utc) * 1000000)::bigint FROM public.device_telemetry \
             WHERE device_id LIKE $1 AND metrics = $2::text::jsonb AND firmware = $3 AND device_type = 'turbine' \
             ORDER BY device_id",
            &[&format!("D{}-%", self.number), &METRICS, &"é\\'1"],
        ).await;
        let stored: Vec<(String, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        assert_eq!(stored, sent, "readings of walk {}", self.number);

        let letters = self
            .read(
                "SELECT reason FROM public.dead_letters WHERE topic LIKE $1 ORDER BY reason",
                &[&format!("og/field/S/turbine/D{}-%", self.number)],
            )
            .await;
        let reasons: Vec<String> = letters.iter().map(|row| row.get(0)).collect();
        assert_eq!(reasons, ["not_json", "rejected_by_database"], "letters of walk {}", self.number);

        let sessions = self
            .read(
                "SELECT connection_status, username, extract(epoch FROM last_activity)::text, \
             extract(epoch FROM login_time)::text, extract(epoch FROM logout_time)::text \
             FROM public.user_sessions WHERE session_id = $1",
                &[&format!("S{}", self.number)],
            )
            .await;
        let sessions: Vec<[String; 5]> =
            sessions.iter().map(|row| [0, 1, 2, 3, 4].map(|column| row.get(column))).collect();
        let second = |second: u32| format!("{}.000001", 1_770_091_500 + second);
        assert_eq!(sessions, [["disconnected".into(), "é".into(), second(9), second(1), second(9)]]);
        let reports = self
            .read(
                "SELECT 1 FROM public.site_activity WHERE site_id = $1 AND metrics = $2::text::jsonb \
             AND timestamp_utc = '2026-02-03T04:05:06Z'",
                &[&format!("W{}", self.number), &METRICS],
            )
            .await;
        assert_eq!(reports.len(), 1, "reports of walk {}", self.number);
    }

    async fn read(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Vec<tokio_postgres::Row> {
        self.admin.query(sql, parameters).await.unwrap()
    }
}

const METRICS: &str = r#"{"rpm": 1.5e-7, "é\\": [null, true, "\u00e9"], "when": "01/02/03"}"#;

fn memory() -> Memory {
    Memory::new(&IngestSettings::default())
}
