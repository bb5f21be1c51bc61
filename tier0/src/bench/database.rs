//! The database's limit: the same rows, encoded beforehand, two writers, COPY and COMMIT only.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context;
use bytes::Bytes;
use ingest::batch::{Batch as _, Path};
use ingest::database::Database;
use ingest::delivery::Delivery;
use ingest::partitions::Layout;
use ingest::reading::Rules;
use ingest::settings::{DatabaseSettings, IngestSettings};
use ingest::telemetry::{Batch, Memory};
use service::health::Health;
use service::secret::Secret;
use simulators::device::payload::{self, Writer};
use tokio::task::JoinSet;
use wire::fleet::Device;

use super::Measured;
use super::floor::Floor;
use playground::postgres::Role;

const DEVICES: u64 = 100_000;

pub(super) async fn measure(floor: &Floor, rows: u64) -> anyhow::Result<Measured> {
    let settings = IngestSettings::default();
    let database = database(floor, settings.writers)?;
    let now_us = jiff::Timestamp::now().as_microsecond();
    floor.make_partitions().await?;
    let batches = Arc::new(Mutex::new(encode(rows, &settings, now_us)));
    let started = Instant::now();
    let mut writers: JoinSet<anyhow::Result<u64>> = JoinSet::new();
    for _ in 0..settings.writers {
        let (batches, database) = (batches.clone(), database.clone());
        writers.spawn(async move {
            let mut committed = 0;
            loop {
                let next = batches.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some(mut batch) = next else { return Ok(committed) };
                let mut client = database.client().await?;
                committed +=
                    batch.commit(&mut client, Path::Fast, database.commit_timeout()).await?.rows as u64;
            }
        });
    }
    let mut committed = 0;
    while let Some(writer) = writers.join_next().await {
        committed += writer.context("a writer")??;
    }
    let per_second = committed as f64 / started.elapsed().as_secs_f64();
    anyhow::ensure!(committed == rows, "{committed} of {rows} rows committed");
    Ok(Measured { per_second, note: format!("{committed} rows") })
}

pub(super) fn database(floor: &Floor, connections: usize) -> anyhow::Result<Database> {
    let primary = floor.cluster.primary();
    let settings = DatabaseSettings {
        hosts: format!("127.0.0.1:{}", primary.port()),
        password: Secret::new(primary.passwords().of(Role::Owner)),
        ..DatabaseSettings::default()
    };
    Database::new(&settings, connections, Health::default().dependency("postgres"))
}

/// The readings the simulator would publish, as closed batches; times advance as at 100,000 a second.
fn encode(rows: u64, settings: &IngestSettings, now_us: i64) -> Vec<Batch> {
    let (oldest_us, newest_us) = Layout::new(settings).window(now_us);
    let rules = Rules::new(oldest_us, newest_us, 1 << 20);
    let mut writer = Writer::new(1);
    let mut batches = Vec::new();
    let mut memory = Memory::new(settings);
    let mut batch = Batch::new("mqtt", rules.clone());
    let received = tokio::time::Instant::now();
    for row in 0..rows {
        let device = Device::new(u32::try_from(row % DEVICES).unwrap_or_default());
        let mut topic = Vec::new();
        payload::topic(&mut topic, &device);
        let mut text = Vec::with_capacity(512);
        let at = i64::try_from(rows - row).unwrap_or_default() * 10;
        writer.reading(&mut text, &device, row / DEVICES, now_us - at);
        let delivery = Delivery::new(Bytes::from(topic), Bytes::from(text), None, received);
        batch.push(delivery, now_us, &mut memory);
        if batch.parts() >= settings.max_rows {
            batch.seal();
            batches.push(std::mem::replace(&mut batch, Batch::new("mqtt", rules.clone())));
        }
    }
    if !batch.deliveries().is_empty() {
        batch.seal();
        batches.push(batch);
    }
    batches.reverse();
    batches
}
