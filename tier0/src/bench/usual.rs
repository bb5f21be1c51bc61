//! The baseline: the usual consumer, a Python script on Debian's libraries. One message is one prepared INSERT, a hundred
//! to a transaction.

use std::path::Path;

use anyhow::{Context, ensure};

use super::Measured;
use super::floor::{Floor, Load, PATIENCE, rate};
use playground::child::Start;
use playground::postgres::Role;

const SCRIPT: &str = include_str!("../../bench/usual_consumer.py");
const DEBIAN_PYTHON: &str = "/usr/bin/python3";

pub(super) async fn measure(floor: &mut Floor, messages: u64) -> anyhow::Result<Measured> {
    ensure!(
        Path::new(DEBIAN_PYTHON).exists() && Path::new("/usr/lib/python3/dist-packages/paho").exists(),
        "the baseline needs Debian's python3, python3-paho-mqtt and python3-psycopg2: apt-get install them, or make bench"
    );
    floor.make_partitions().await?;
    let port = floor.broker().await?.port();
    let primary = floor.cluster.primary();
    let log = floor.path("usual-consumer.log");
    if log.exists() {
        std::fs::remove_file(&log).context("remove the log of the round before")?;
    }
    let mut consumer = Start::new("usual-consumer", DEBIAN_PYTHON, &log)
        .args(["-u".to_owned(), "-c".to_owned(), SCRIPT.to_owned(), port.to_string()])
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", primary.port().to_string())
        .env("PGDATABASE", playground::postgres::DATABASE)
        .env("PGUSER", Role::Owner.name())
        .env("PGPASSWORD", primary.passwords().of(Role::Owner))
        .spawn()
        .await?;
    let subscribed = async || {
        let text = std::fs::read_to_string(&log)?;
        ensure!(text.contains("subscribed"), "not subscribed yet");
        Ok(())
    };
    consumer.until("subscribes", PATIENCE, subscribed).await?;
    // Whole transactions only: the script leaves a part of one uncommitted.
    let messages = messages / 100 * 100;
    let mut publisher = floor.publisher(Load::singles(1, messages)).await?;
    let (per_second, count) = rate(messages, async || {
        let text = std::fs::read_to_string(&log).context("read the consumer's log")?;
        if let Some(status) = consumer.ended() {
            anyhow::bail!("the usual consumer ended ({status}): {text}");
        }
        Ok(text.lines().rev().find_map(|line| line.parse().ok()).unwrap_or(0))
    })
    .await?;
    let ledger = floor.ledger(&mut publisher).await?;
    ensure!(count >= ledger.acknowledged, "{count} of {} rows", ledger.acknowledged);
    Ok(Measured { per_second, note: format!("{count} rows") })
}
