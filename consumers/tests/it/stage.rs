//! RabbitMQ, Postgres and `rabbitmq-consumer` for one test, and a publisher that knows what the broker confirmed.

use std::time::Duration;

use amqp::Broker;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Confirmation};
use playground::cluster::{Cluster, Options};
use playground::postgres::Role;
use playground::program::{Launch, Program};
use playground::rabbitmq::RabbitMq;
use playground::scratch::Scratch;
use tokio::time::{Instant, sleep, timeout};

use crate::floor::PATIENCE;

pub(crate) const QUEUE: &str = "user_activity_queue";
/// What is published again although it had arrived is there twice, which tests that count do not expect.
const CONFIRM: Duration = Duration::from_secs(30);

pub(crate) struct Stage {
    pub(crate) consumer: Program,
    pub(crate) broker: RabbitMq,
    pub(crate) cluster: Cluster,
    pub(crate) scratch: Scratch,
}

impl Stage {
    /// Everything started; the consumer consumes.
    pub(crate) async fn new(options: Options, change: impl FnOnce(Launch) -> Launch) -> Self {
        Self::prepared(options, &[], async |_| {}, change).await
    }

    /// The broker is prepared before the consumer sees it. `extra` are lines of its configuration.
    pub(crate) async fn prepared(
        options: Options,
        extra: &[&str],
        prepare: impl AsyncFnOnce(&RabbitMq),
        change: impl FnOnce(Launch) -> Launch,
    ) -> Self {
        let scratch = Scratch::new().unwrap();
        let (cluster, broker) =
            tokio::try_join!(Cluster::start(&scratch, options), RabbitMq::start(&scratch, extra)).unwrap();
        ingest::schema::migrate(&mut cluster.connect(Role::Owner).await.unwrap()).await.unwrap();
        prepare(&broker).await;
        let launch = launch(&cluster, &broker);
        let mut consumer = change(launch).start(scratch.path()).await.unwrap();
        consumer.ready(PATIENCE).await.unwrap();
        Self { consumer, broker, cluster, scratch }
    }

    /// One more consumer, by another name; not waited for.
    pub(crate) async fn start(&self, name: &str, change: impl FnOnce(Launch) -> Launch) -> Program {
        change(launch(&self.cluster, &self.broker).named(name)).start(self.scratch.path()).await.unwrap()
    }

    /// Waits until a line of the program's log says this.
    pub(crate) async fn until_log(&self, program: &Program, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = std::fs::read_to_string(program.log()).unwrap();
            if log.contains(text) {
                return;
            }
            assert!(Instant::now() < deadline, "not said: {text}\n{log}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a queue holds so many messages that nobody has.
    pub(crate) async fn until_waiting(&self, queue: &str, expected: u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let waiting = self.waiting(queue).await;
            if waiting == expected {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{waiting} messages in {queue}, not {expected}{}",
                playground::child::tail(self.consumer.log(), 40)
            );
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// A channel on a connection of its own, as somebody else's program has.
    pub(crate) async fn channel(&self) -> (lapin::Connection, lapin::Channel) {
        let connection = amqp::connect(&self.settings(QUEUE), "somebody else").await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        (connection, channel)
    }

    pub(crate) fn settings(&self, queue: &str) -> Broker {
        Broker { port: self.broker.port(), queue: queue.into(), ..Broker::default() }
    }

    pub(crate) async fn publisher(&self, queue: &str) -> Publisher {
        Publisher::new(self.settings(queue)).await
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        self.cluster.connect(Role::Owner).await.unwrap().query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Waits until the query's number is exactly this.
    pub(crate) async fn until(&self, sql: &str, expected: i64) {
        let db = self.cluster.connect(Role::Owner).await.unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found: i64 = db.query_one(sql, &[]).await.unwrap().get(0);
            if found == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{sql}: {found}, not {expected}, after {PATIENCE:?}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until nothing is left with the broker, delivered or not. The consumer has ended then: what it had not
    /// acknowledged would be back in the queue.
    pub(crate) async fn until_acknowledged(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let all = self.consumer.metrics().await.is_ok_and(|metrics| {
                let answered = metrics.count("ingest_acknowledged_total")
                    + metrics.count("rabbitmq_stale_acknowledgements_total");
                answered == metrics.count("ingest_received_total")
            });
            if all && self.waiting(QUEUE).await == 0 {
                self.consumer.terminate(PATIENCE).await.unwrap();
                if self.waiting(QUEUE).await == 0 {
                    return;
                }
                self.consumer.restart().await.unwrap();
                self.consumer.ready(PATIENCE).await.unwrap();
            }
            assert!(Instant::now() < deadline, "not all is acknowledged");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// A queue whose leader is not elected yet, after the broker has come back, does not answer.
    pub(crate) async fn waiting(&self, queue: &str) -> u32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match waiting_now(&self.settings(queue)).await {
                Ok(count) => return count,
                Err(error) => assert!(Instant::now() < deadline, "{queue}: {error:#}"),
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn waiting_now(broker: &Broker) -> anyhow::Result<u32> {
    let connection = amqp::connect(broker, "test").await?;
    let channel = connection.create_channel().await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let queue = broker.queue.as_str().into();
    Ok(channel.queue_declare(queue, passive, FieldTable::default()).await?.message_count())
}

fn launch(cluster: &Cluster, broker: &RabbitMq) -> Launch {
    Launch::new("rabbitmq-consumer").envs(cluster.writer_environment()).envs(broker.environment())
}

/// Publishes with confirms, as every publisher must: what has none in time is published again. A broker that has
/// just come back may forget what it was given before its queue had a leader.
pub(crate) struct Publisher {
    broker: Broker,
}

impl Publisher {
    pub(crate) async fn new(broker: Broker) -> Self {
        Self { broker }
    }

    /// Returns when the broker has all of them.
    pub(crate) async fn publish(&self, payloads: impl IntoIterator<Item = String>) {
        let payloads: Vec<String> = payloads.into_iter().collect();
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.try_publish(&payloads).await {
            assert!(Instant::now() < deadline, "the broker does not confirm: {error}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn try_publish(&self, payloads: &[String]) -> Result<(), String> {
        let text = |error: lapin::Error| error.to_string();
        let connection = amqp::connect(&self.broker, "test").await.map_err(|error| error.to_string())?;
        let channel = connection.create_channel().await.map_err(text)?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(text)?;
        let mut confirms = Vec::new();
        for payload in payloads {
            let properties = BasicProperties::default().with_delivery_mode(2);
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let (exchange, key) = ("".into(), self.broker.queue.as_str().into());
            let confirm = channel.basic_publish(exchange, key, options, payload.as_bytes(), properties);
            confirms.push(confirm.await.map_err(text)?);
        }
        for confirm in confirms {
            match timeout(CONFIRM, confirm).await {
                Ok(Ok(Confirmation::Ack(None))) => {}
                other => return Err(format!("{other:?}")),
            }
        }
        Ok(())
    }
}

pub(crate) fn event(session: usize, second: usize, event: &str, status: &str) -> String {
    format!(
        r#"{{"user_id":"user_{session:04}","session_id":"SESS-{session}","event":"{event}","connection_status":"{status}","region":"NA-WEST","timestamp":"2026-02-03T04:{:02}:{:02}Z"}}"#,
        second / 60,
        second % 60
    )
}

/// `login` then `active`, the later one first, for sessions `from..to`.
pub(crate) fn events(from: usize, to: usize) -> impl Iterator<Item = String> {
    (from..to).flat_map(|n| [event(n, 30, "active", "active"), event(n, 10, "login", "active")])
}

pub(crate) const SESSIONS: &str = "SELECT count(*) FROM user_sessions WHERE connection_status = 'active' \
    AND last_activity = '2026-02-03T04:00:30Z' AND login_time = '2026-02-03T04:00:10Z'";
