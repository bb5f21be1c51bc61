//! `tier0 bench-sessions`: user activity through RabbitMQ, beside the broker's own limit and the usual consumer.
//!
//! Every row: `user-simulator` publishes as fast as the broker confirms (persistent, confirms on) to a fresh quorum queue.
//! *Limit*: a consumer that only acknowledges, many at once. *Ours*: `rabbitmq-consumer` and Postgres with its synchronous
//! standby; the ledger is checked. *Baseline*: one upsert per message, prefetch 1. Medians count.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use amqp::Broker;
use anyhow::{Context, bail};
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::task::JoinSet;

use super::floor::{PATIENCE, rate};
use crate::terminal::say;
use crate::up::load_session_ledger;
use crate::verify::sessions::{compare, read};
use playground::cluster::{Cluster, Options};
use playground::postgres::Role;
use playground::program::{Launch, Program};
use playground::rabbitmq::RabbitMq;
use playground::scratch::Scratch;

/// A consumer that only acknowledges does so once for so many, or when nothing more is there.
const ACK_EVERY: usize = 500;
const READY: Duration = Duration::from_secs(60);
/// The usual consumer is so much slower that it need not be shown everything.
const BASELINE_PART: u64 = 50;

/// Options of `bench-sessions`.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchSessionsArgs {
    /// Number of measurements per row; the median is reported
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub rounds: u32,
    /// Messages per measurement
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    pub messages: u64,
    /// Maximum number of unacknowledged messages, for rabbitmq-consumer and for the consumer that only
    /// acknowledges
    #[arg(long, default_value_t = 5_000, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub prefetch: u16,
    /// File for the medians, as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench-sessions.json")]
    pub json: PathBuf,
}

struct Floor {
    broker: RabbitMq,
    cluster: Cluster,
    scratch: Scratch,
    queues: u32,
    prefetch: u16,
}

/// Runs the benchmark and prints the table.
///
/// # Errors
/// When a server or process fails, or when a ledger does not match the table.
pub async fn run(args: BenchSessionsArgs) -> anyhow::Result<()> {
    let scratch = Scratch::new()?;
    let (cluster, broker) =
        tokio::try_join!(Cluster::start(&scratch, Options::default()), RabbitMq::start(&scratch, &[]))?;
    ingest::schema::migrate(&mut *cluster.connect(Role::Owner).await?).await?;
    let mut floor = Floor { broker, cluster, scratch, queues: 0, prefetch: args.prefetch };
    let mut samples = [const { Vec::new() }; 3];
    for round in 1..=args.rounds {
        let measured = [
            floor.limit(args.messages).await.context("measure the limit")?,
            floor.ours(args.messages).await.context("measure ours")?,
            floor.baseline(args.messages / BASELINE_PART).await.context("measure the baseline")?,
        ];
        for ((name, rate), samples) in NAMES.iter().zip(measured).zip(&mut samples) {
            say(format_args!("round {round}  {name:<10} {rate:>9.0}/s"));
            samples.push(rate);
        }
    }
    floor.broker.stop().await?;
    floor.cluster.stop().await?;
    let [limit, ours, baseline] = samples.map(median);
    say(format_args!("\nmedians    limit {limit:.0}/s, ours {ours:.0}/s, baseline {baseline:.0}/s"));
    say(format_args!("ours / limit {:.2}, ours / baseline {:.1}", ours / limit, ours / baseline));
    if let Some(parent) = args.json.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    let document = serde_json::json!({ "limit": limit, "ours": ours, "baseline": baseline });
    std::fs::write(&args.json, serde_json::to_string_pretty(&document)?)
        .with_context(|| format!("write {}", args.json.display()))
}

const NAMES: [&str; 3] = ["limit", "ours", "baseline"];

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}

impl Floor {
    /// A queue nobody has used.
    fn queue(&mut self) -> Broker {
        self.queues += 1;
        let queue = format!("bench-{}", self.queues);
        Broker { port: self.broker.port(), queue, ..Broker::default() }
    }

    async fn publish(&self, broker: &Broker, messages: u64) -> anyhow::Result<Program> {
        let ledger = self.scratch.path().join("sessions.json");
        let args = ["--rate", "max", "--count", &messages.to_string(), "--queue", &broker.queue];
        let launch = Launch::new("user-simulator").envs(self.broker.environment()).args(args);
        launch.args(["--ledger", &ledger.display().to_string()]).start(self.scratch.path()).await
    }

    async fn limit(&mut self, messages: u64) -> anyhow::Result<f64> {
        let broker = self.queue();
        let (_connection, channel, mut consumer) = consume(&broker, self.prefetch).await?;
        let count = Arc::new(AtomicU64::new(0));
        let counted = count.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Some(delivery) = consumer.next().await {
                let mut last = delivery?.delivery_tag;
                let mut taken = 1;
                while taken < ACK_EVERY
                    && let Some(Some(more)) = consumer.next().now_or_never()
                {
                    last = more?.delivery_tag;
                    taken += 1;
                }
                channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
                counted.fetch_add(taken as u64, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
        let mut publisher = self.publish(&broker, messages).await?;
        let (rate, _) = rate(messages, async || Ok(count.load(Ordering::Relaxed))).await?;
        ended(&mut publisher).await?;
        Ok(rate)
    }

    async fn ours(&mut self, messages: u64) -> anyhow::Result<f64> {
        let broker = self.queue();
        self.cluster
            .connect(Role::Owner)
            .await?
            .batch_execute("TRUNCATE user_sessions, site_activity")
            .await?;
        let launch = Launch::new("rabbitmq-consumer").envs(self.cluster.writer_environment());
        let launch = launch.envs(self.broker.environment()).set("rabbitmq.queue", &broker.queue);
        let launch = launch.set("rabbitmq_consumer.prefetch", self.prefetch);
        let mut consumer = launch.start(self.scratch.path()).await?;
        consumer.ready(READY).await?;
        let mut publisher = self.publish(&broker, messages).await?;
        let (rate, _) =
            rate(messages, async || Ok(consumer.metrics().await?.count("ingest_acknowledged_total"))).await?;
        ended(&mut publisher).await?;
        consumer.terminate(PATIENCE).await?;
        self.cluster.wait_replayed(PATIENCE).await?;
        let ledger = load_session_ledger(&self.scratch.path().join("sessions.json"))?;
        for node in &self.cluster.nodes {
            let db = node.connect(Role::Owner).await?;
            let findings = compare(node.name(), &ledger, &read(&db, &ledger).await?);
            if !findings.holds() {
                bail!("the ledger does not match the table: {findings}");
            }
        }
        Ok(rate)
    }

    /// As it is usually written: parse, upsert, acknowledge, one message at a time.
    async fn baseline(&mut self, messages: u64) -> anyhow::Result<f64> {
        const UPSERT: &str = "INSERT INTO user_sessions (session_id, user_id, connection_status, region, last_activity) \
            VALUES ($1, $2, $3, $4, $5) ON CONFLICT (session_id) DO UPDATE SET connection_status = excluded.connection_status, \
            region = excluded.region, last_activity = excluded.last_activity \
            WHERE user_sessions.last_activity <= excluded.last_activity";
        let broker = self.queue();
        let db = self.cluster.connect(Role::Owner).await?;
        let upsert = db.prepare(UPSERT).await?;
        let (_connection, _channel, mut consumer) = consume(&broker, 1).await?;
        let count = Arc::new(AtomicU64::new(0));
        let counted = count.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Some(delivery) = consumer.next().await {
                let delivery = delivery?;
                let message: serde_json::Value = serde_json::from_slice(&delivery.data)?;
                let text = |key: &str| message.get(key).and_then(serde_json::Value::as_str);
                // Site reports would be 20 upserts each; the usual consumer is spared them.
                if let (Some(session), Some(user), Some(status), Some(region), Some(at)) = (
                    text("session_id"),
                    text("user_id"),
                    text("connection_status"),
                    text("region"),
                    text("timestamp"),
                ) {
                    let at: jiff::Timestamp = at.parse()?;
                    db.execute(&upsert, &[&session, &user, &status, &region, &at]).await?;
                }
                delivery.acker.ack(BasicAckOptions::default()).await?;
                counted.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
        let mut publisher = self.publish(&broker, messages).await?;
        let (rate, _) = rate(messages, async || Ok(count.load(Ordering::Relaxed))).await?;
        ended(&mut publisher).await?;
        Ok(rate)
    }
}

async fn consume(broker: &Broker, prefetch: u16) -> anyhow::Result<(Connection, Channel, Consumer)> {
    let connection = amqp::connect(broker, "bench").await?;
    amqp::declare(&connection, broker).await?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let queue = broker.queue.as_str().into();
    let options = BasicConsumeOptions::default();
    let consumer = channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
    Ok((connection, channel, consumer))
}

/// The publisher ends when all is confirmed.
async fn ended(publisher: &mut Program) -> anyhow::Result<()> {
    let status = publisher.wait(PATIENCE).await?;
    if !status.success() {
        bail!("user-simulator ended with {status}");
    }
    Ok(())
}
