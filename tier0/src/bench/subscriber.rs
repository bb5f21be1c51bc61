//! The broker's limit: publisher, broker, and a subscriber that only counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{ConnectProperties, Packet, Publish};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use tokio::task::JoinSet;
use tokio::time::timeout;
use wire::topic::FILTER;

use super::Measured;
use super::floor::{Floor, Load, PATIENCE, rate};

/// In flight towards a subscriber, as `mqtt-consumer` announces.
const RECEIVE_MAXIMUM: u16 = 60_000;

/// rumqttc's own client with acknowledgements by hand: what a usual consumer is built on.
pub(super) fn client(port: u16) -> (AsyncClient, EventLoop) {
    let mut options = MqttOptions::new("bench-subscriber", "127.0.0.1", port);
    options.set_keep_alive(Duration::from_secs(30));
    options.set_manual_acks(true);
    options.set_outgoing_inflight_upper_limit(100);
    options.set_connect_properties(ConnectProperties {
        receive_maximum: Some(RECEIVE_MAXIMUM),
        max_packet_size: Some(1 << 20),
        ..ConnectProperties::new()
    });
    AsyncClient::new(options, usize::from(RECEIVE_MAXIMUM) + 100)
}

/// Polls until subscribed.
pub(super) async fn subscribe(client: &AsyncClient, events: &mut EventLoop) -> anyhow::Result<()> {
    client.subscribe(FILTER, QoS::AtLeastOnce).await.context("subscribe")?;
    let subscribed = async {
        loop {
            if let Event::Incoming(Packet::SubAck(_)) = events.poll().await? {
                return anyhow::Ok(());
            }
        }
    };
    timeout(PATIENCE, subscribed).await.context("subscribe in time")?
}

/// The next message; other packets are passed over.
pub(super) async fn next(events: &mut EventLoop) -> anyhow::Result<Publish> {
    loop {
        if let Event::Incoming(Packet::Publish(publish)) = events.poll().await.context("receive")? {
            return Ok(publish);
        }
    }
}

pub(super) async fn measure(floor: &mut Floor, qos: u8, messages: u64) -> anyhow::Result<Measured> {
    let (client, mut events) = client(floor.broker().await?.port());
    subscribe(&client, &mut events).await?;
    let received = Arc::new(AtomicU64::new(0));
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let counter = received.clone();
    tasks.spawn(async move {
        loop {
            let publish = next(&mut events).await?;
            if publish.qos != QoS::AtMostOnce {
                client.try_ack(&publish).context("acknowledge")?;
            }
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut publisher = floor.publisher(Load::singles(qos, messages)).await?;
    let measured = tokio::select! {
        measured = rate(messages, async || Ok(received.load(Ordering::Relaxed))) => measured?,
        Some(ended) = tasks.join_next() => {
            ended.context("the subscriber")??;
            anyhow::bail!("the subscriber ended");
        }
    };
    let ledger = floor.ledger(&mut publisher).await?;
    let (per_second, count) = measured;
    let missing = ledger.acknowledged.saturating_sub(count);
    Ok(Measured { per_second, note: format!("{count} received, {missing} missing") })
}
