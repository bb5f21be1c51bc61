//! What the broker still holds for the consumer from an earlier run: stored before this run begins, so that it is not taken
//! for its own.
//!
//! The broker's queue for a session is first in, first out. So a reading of ours is sent through it: when that is stored,
//! everything before it has been taken; when nothing is in flight then, all of it is stored. Ours is deleted again.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use jiff::Timestamp;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use serde_json::json;

use super::stack::Stack;
use crate::terminal::say;
use playground::child::POLL;
use playground::postgres::Role;

/// An hour of messages at full rate is taken in less.
const LIMIT: Duration = Duration::from_secs(1800);
const BROKER: Duration = Duration::from_secs(10);
const DEVICE: &str = "tier0-up";

pub(super) async fn take(stack: &mut Stack) -> anyhow::Result<()> {
    let Some(port) = stack.broker.as_ref().filter(|_| stack.kept).map(|broker| broker.port()) else {
        return Ok(());
    };
    if stack.consumer.is_none() {
        return Ok(());
    }
    // Microseconds are what the table keeps.
    let now = Timestamp::from_microsecond(Timestamp::now().as_microsecond()).context("the clock")?;
    tokio::time::timeout(BROKER, send(port, now))
        .await
        .with_context(|| format!("the broker did not take a message within {BROKER:?}"))??;
    let db = stack.cluster.connect(Role::Owner).await?;
    let ours = "SELECT count(*) FROM device_telemetry WHERE timestamp_utc = $1 AND device_id = $2";
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(what) = stack.died() {
            bail!("while messages of an earlier run were stored: {what}");
        }
        let row = db.query_one(ours, &[&now, &DEVICE]).await.context("look for the last leftover")?;
        if row.get::<_, i64>(0) == 1 {
            let metrics = stack.consumer_metrics().await.context("the consumer does not answer")?;
            if metrics.count("ingest_rows_in_flight") + metrics.count("ingest_queue_messages") == 0 {
                let others = metrics.count("ingest_received_total").saturating_sub(1);
                if others > 0 {
                    say(format!(
                        "  {others} messages of an earlier run were still in the broker; they are stored"
                    ));
                }
                break;
            }
        }
        if Instant::now() > deadline {
            bail!("the broker still holds messages of an earlier run after {LIMIT:?}; --fresh forgets them");
        }
        tokio::time::sleep(POLL).await;
    }
    let delete = "DELETE FROM device_telemetry WHERE timestamp_utc = $1 AND device_id = $2";
    db.execute(delete, &[&now, &DEVICE]).await.context("delete our own reading")?;
    Ok(())
}

/// Publishes our reading; returns when the broker has acknowledged it.
async fn send(port: u16, now: Timestamp) -> anyhow::Result<()> {
    let reading = json!({
        "device_id": DEVICE, "device_type": "marker", "site_id": "tier0", "timestamp_utc": now.to_string(), "metrics": {}
    });
    let topic = format!("og/field/tier0/marker/{DEVICE}");
    let (client, mut events) = AsyncClient::new(MqttOptions::new(DEVICE, "127.0.0.1", port), 10);
    client.try_publish(topic, QoS::AtLeastOnce, false, reading.to_string()).context("publish")?;
    loop {
        if let Event::Incoming(Packet::PubAck(_)) =
            events.poll().await.context("send a message to the broker")?
        {
            return Ok(());
        }
    }
}
