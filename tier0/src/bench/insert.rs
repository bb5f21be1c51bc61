//! The same one-by-one way in Rust: what changes when only the language does. Acknowledges after the COMMIT.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::database::database;
use super::floor::{Floor, Load, rate};
use super::{Measured, subscriber};

const BATCH: usize = 100;
const INSERT: &str = "INSERT INTO device_telemetry (device_id, device_type, site_id, timestamp_utc, firmware, metrics, \
    status, location, tags) VALUES ($1, $2, $3, $4::text::timestamptz, $5, $6, $7, $8, $9)";

pub(super) async fn measure(floor: &mut Floor, messages: u64) -> anyhow::Result<Measured> {
    let (client, mut events) = subscriber::client(floor.broker().await?.port());
    subscriber::subscribe(&client, &mut events).await?;
    let database = database(floor, 1)?;
    floor.make_partitions().await?;
    let mut db = database.client().await?;
    let committed = Arc::new(AtomicU64::new(0));
    let counter = committed.clone();
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    tasks.spawn(async move {
        let insert = db.prepare_cached(INSERT).await?;
        loop {
            let mut batch = vec![subscriber::next(&mut events).await?];
            while batch.len() < BATCH {
                match timeout(Duration::from_millis(100), subscriber::next(&mut events)).await {
                    Ok(publish) => batch.push(publish?),
                    Err(_) => break,
                }
            }
            let transaction = db.transaction().await?;
            for publish in &batch {
                let reading: Value = serde_json::from_slice(&publish.payload).context("a reading")?;
                let text = |key: &str| reading.get(key).and_then(Value::as_str);
                let document = |key: &str| reading.get(key);
                transaction
                    .execute(
                        &insert,
                        &[
                            &text("device_id"),
                            &text("device_type"),
                            &text("site_id"),
                            &text("timestamp_utc"),
                            &text("firmware"),
                            &document("metrics"),
                            &document("status"),
                            &document("location"),
                            &document("tags"),
                        ],
                    )
                    .await?;
            }
            transaction.commit().await?;
            for publish in &batch {
                client.try_ack(publish)?;
            }
            counter.fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
    });
    let mut publisher = floor.publisher(Load::singles(1, messages)).await?;
    let (per_second, count) = tokio::select! {
        measured = rate(messages, async || Ok(committed.load(Ordering::Relaxed))) => measured?,
        Some(ended) = tasks.join_next() => {
            ended.context("the inserting consumer")??;
            anyhow::bail!("the inserting consumer ended");
        }
    };
    let ledger = floor.ledger(&mut publisher).await?;
    ensure!(count >= ledger.acknowledged, "{count} of {} rows", ledger.acknowledged);
    Ok(Measured { per_second, note: format!("{count} rows") })
}
