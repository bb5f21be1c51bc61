//! The real `rabbitmq-consumer` between a real RabbitMQ and a real Postgres: nothing lost, whatever goes away.

use std::time::Duration;

use amqp::Broker;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Confirmation};
use playground::child::Reach;
use playground::cluster::{Cluster, Options};
use playground::postgres::Role;
use playground::program::{Launch, Program};
use playground::rabbitmq::RabbitMq;
use playground::scratch::Scratch;
use tokio::time::{Instant, sleep, timeout};

use crate::floor::PATIENCE;

const QUEUE: &str = "user_activity_queue";

struct Stage {
    consumer: Program,
    broker: RabbitMq,
    cluster: Cluster,
    scratch: Scratch,
}

impl Stage {
    async fn new(options: Options, change: impl FnOnce(Launch) -> Launch) -> Self {
        let scratch = Scratch::new().unwrap();
        let (cluster, broker) =
            tokio::try_join!(Cluster::start(&scratch, options), RabbitMq::start(&scratch, &[])).unwrap();
        ingest::schema::migrate(&mut cluster.connect(Role::Owner).await.unwrap()).await.unwrap();
        let launch =
            Launch::new("rabbitmq-consumer").envs(cluster.writer_environment()).envs(broker.environment());
        let mut consumer = change(launch).start(scratch.path()).await.unwrap();
        consumer.ready(PATIENCE).await.unwrap();
        Self { consumer, broker, cluster, scratch }
    }

    fn settings(&self, queue: &str) -> Broker {
        Broker { port: self.broker.port(), queue: queue.into(), ..Broker::default() }
    }

    async fn publisher(&self, queue: &str) -> Publisher {
        Publisher::new(self.settings(queue)).await
    }

    async fn number(&self, sql: &str) -> i64 {
        self.cluster.connect(Role::Owner).await.unwrap().query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Waits until the query's number is exactly this.
    async fn until(&self, sql: &str, expected: i64) {
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
    async fn until_acknowledged(&mut self) {
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

    async fn waiting(&self, queue: &str) -> u32 {
        let connection = amqp::connect(&self.settings(queue), "test").await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(queue.into(), passive, FieldTable::default()).await.unwrap().message_count()
    }
}

/// Publishes with confirms, as every publisher must: what has none in time is published again. A broker that has
/// just come back may forget what it was given before its queue had a leader.
struct Publisher {
    broker: Broker,
}

impl Publisher {
    async fn new(broker: Broker) -> Self {
        Self { broker }
    }

    /// Returns when the broker has all of them.
    async fn publish(&self, payloads: impl IntoIterator<Item = String>) {
        let payloads: Vec<String> = payloads.into_iter().collect();
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.try_publish(&payloads).await {
            assert!(Instant::now() < deadline, "the broker does not confirm: {error}");
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
            match timeout(Duration::from_secs(8), confirm).await {
                Ok(Ok(Confirmation::Ack(None))) => {}
                other => return Err(format!("{other:?}")),
            }
        }
        Ok(())
    }
}

fn event(session: usize, second: usize, event: &str, status: &str) -> String {
    format!(
        r#"{{"user_id":"user_{session:04}","session_id":"SESS-{session}","event":"{event}","connection_status":"{status}","region":"NA-WEST","timestamp":"2026-02-03T04:{:02}:{:02}Z"}}"#,
        second / 60,
        second % 60
    )
}

/// `login` then `active`, the later one first, for sessions `from..to`.
fn events(from: usize, to: usize) -> impl Iterator<Item = String> {
    (from..to).flat_map(|n| [event(n, 30, "active", "active"), event(n, 10, "login", "active")])
}

const SESSIONS: &str = "SELECT count(*) FROM user_sessions WHERE connection_status = 'active' \
    AND last_activity = '2026-02-03T04:00:30Z' AND login_time = '2026-02-03T04:00:10Z'";

#[tokio::test]
async fn sessions_follow_their_newest_event_and_reports_are_kept() {
    let mut stage = Stage::new(Options::default(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events(0, 1_000)).await;
    stage.until(SESSIONS, 1_000).await;
    let report = r#"{"message_id":"m1","timestamp_utc":"2026-02-03T04:05:00Z","site_id":"SFO-WEB-01",
        "metrics":{"active_users":2,"server_cpu_pct":31.5},"active_users_list":[
        {"user_id":"user_0001","username":"ann","session_id":"SESS-1","login_time":"2026-02-03T04:00:00Z","ip_address":"10.0.0.1","region":"NA-WEST","connection_status":"idle"}],
        "queue_metadata":{}}"#;
    publisher.publish([report.to_owned(), report.to_owned(), event(2, 400, "logout", "disconnected")]).await;
    publisher.publish([event(2, 300, "active", "active")]).await;
    stage
        .until("SELECT count(*) FROM user_sessions WHERE connection_status = 'idle' AND username = 'ann'", 1)
        .await;
    stage
        .until("SELECT count(*) FROM user_sessions WHERE connection_status = 'disconnected' AND logout_time = '2026-02-03T04:06:40Z'", 1)
        .await;
    stage.until("SELECT count(*) FROM site_activity WHERE site_id = 'SFO-WEB-01'", 1).await;
    stage.until(SESSIONS, 998).await;
    stage.until_acknowledged().await;
}

#[tokio::test]
async fn a_broker_killed_and_restarted_in_mid_stream_loses_nothing() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    stage.broker.until_registered(QUEUE).await.unwrap();
    publisher.publish(events(0, 1_000)).await;
    // Delivered, not yet committed: the broker dies with the acknowledgements outstanding.
    stage.cluster.primary_mut().pause(Reach::Tree);
    publisher.publish(events(1_000, 2_000)).await;
    stage.broker.kill9().await.unwrap();
    stage.cluster.primary_mut().resume();
    stage.broker.resurrect().await.unwrap();
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events(2_000, 3_000)).await;
    stage.until(SESSIONS, 3_000).await;
    assert!(stage.consumer.metrics().await.unwrap().count("rabbitmq_reconnects_total") > 0);
    stage.until_acknowledged().await;
}

/// Ended as soon as its rows show, so with their acknowledgements hardly sent: they count all the same.
#[tokio::test]
async fn an_orderly_end_leaves_nothing_with_the_broker_that_is_committed() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    for round in 0..10 {
        publisher.publish(events(round * 300, (round + 1) * 300)).await;
        stage.until(SESSIONS, 300 * (round as i64 + 1)).await;
        stage.consumer.terminate(PATIENCE).await.unwrap();
        assert_eq!(stage.waiting(QUEUE).await, 0, "round {round}");
        stage.consumer.restart().await.unwrap();
        stage.consumer.ready(PATIENCE).await.unwrap();
        assert_eq!(
            stage.consumer.metrics().await.unwrap().count("ingest_received_total"),
            0,
            "round {round}"
        );
    }
}

/// Killed after every COMMIT it managed to make and before the acknowledgement of the last: the standby, whose answer a
/// COMMIT waits for, is away while rows are already written on the primary.
#[tokio::test]
async fn a_consumer_killed_between_commit_and_acknowledgement_loses_nothing() {
    let mut stage = Stage::new(Options::default(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(events(0, 500)).await;
    stage.until(SESSIONS, 500).await;
    stage.cluster.standby_mut().pause(Reach::Tree);
    publisher.publish(events(500, 1_000)).await;
    // The commit record is on the primary; only the wait for the standby hides its rows.
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'tier0-ingest'";
    let deadline = Instant::now() + PATIENCE;
    // What another role's sessions do only the superuser sees.
    let admin = stage.cluster.primary().admin().await.unwrap();
    while admin.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 0 {
        assert!(Instant::now() < deadline, "no commit waits for the standby");
        sleep(Duration::from_millis(10)).await;
    }
    stage.consumer.kill9().await.unwrap();
    stage.cluster.standby_mut().resume();
    // What had been committed shows without any consumer, be it the first event only; nothing of it was acknowledged.
    let deadline = Instant::now() + PATIENCE;
    while stage.number("SELECT count(*) FROM user_sessions").await <= 500 {
        assert!(Instant::now() < deadline, "the commit does not show");
        sleep(Duration::from_millis(10)).await;
    }
    let deadline = Instant::now() + PATIENCE;
    while stage.waiting(QUEUE).await < 1_000 {
        assert!(Instant::now() < deadline, "the broker does not give the messages back");
        sleep(Duration::from_millis(50)).await;
    }
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 1_000).await;
    stage.consumer.ready(PATIENCE).await.unwrap();
    stage.until_acknowledged().await;
}

#[tokio::test]
async fn poison_in_the_middle_of_a_batch_costs_only_itself() {
    let mut stage = Stage::new(Options::alone(), |launch| launch.set("ingest.max_age", "200ms")).await;
    let publisher = stage.publisher(QUEUE).await;
    let mut payloads: Vec<String> = events(0, 100).collect();
    let refused_by_database = r#"{"timestamp_utc":"2026-02-03T04:05:00Z","site_id":"W","metrics":{"x":1e999999},"active_users_list":[]}"#;
    for (at, poison) in
        [(17, "not json"), (60, "[]"), (111, refused_by_database), (150, r#"{"event":"login"}"#)]
    {
        payloads.insert(at, poison.to_owned());
    }
    publisher.publish(payloads).await;
    stage.until(SESSIONS, 100).await;
    stage.until("SELECT count(*) FROM dead_letters WHERE source = 'rabbitmq'", 4).await;

    let letters = stage.settings(QUEUE).dead_letter_queue();
    let connection = amqp::connect(&stage.settings(QUEUE), "test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut consumer = channel
        .basic_consume(letters.as_str().into(), "".into(), options, FieldTable::default())
        .await
        .unwrap();
    let mut found = Vec::new();
    while found.len() < 4 {
        let letter = timeout(PATIENCE, consumer.next()).await.expect("a dead letter").unwrap().unwrap();
        let headers = letter.properties.headers().clone().unwrap();
        let Some(AMQPValue::LongString(reason)) = headers.inner().get("x-tier0-reason").cloned() else {
            panic!("no reason in {headers:?}");
        };
        found.push((reason.to_string(), String::from_utf8(letter.data).unwrap()));
    }
    found.sort();
    let mut expected = [
        ("not_json", "not json"),
        ("wrong_type", "[]"),
        ("rejected_by_database", refused_by_database),
        ("missing_field", r#"{"event":"login"}"#),
    ]
    .map(|(reason, payload)| (reason.to_owned(), payload.to_owned()));
    expected.sort();
    assert_eq!(found, expected);
    stage.until_acknowledged().await;
}

#[tokio::test]
async fn poison_is_rejected_when_the_broker_takes_no_messages() {
    let mut stage = Stage::new(Options::alone(), |launch| launch).await;
    let publisher = stage.publisher(QUEUE).await;
    publisher.publish(["not json".to_owned()]).await;
    stage.until("SELECT count(*) FROM dead_letters", 1).await;
    publisher.publish(events(0, 300).chain(["not json either".to_owned()])).await;
    stage.until("SELECT count(*) FROM dead_letters", 2).await;
    // An alarm blocks every connection that publishes. What consumes goes on, acknowledgements too.
    stage.consumer.terminate(PATIENCE).await.unwrap();
    publisher.publish(events(300, 600).chain(["poison under an alarm".to_owned()])).await;
    stage.broker.control(&["set_vm_memory_high_watermark", "absolute", "1MB"]).await.unwrap();
    stage.consumer.restart().await.unwrap();
    stage.until(SESSIONS, 600).await;
    stage.until("SELECT count(*) FROM dead_letters", 3).await;
    stage.consumer.ready(PATIENCE).await.unwrap();
    // The newest message was rejected, the others acknowledged around it: had that closed the channel, all of them would
    // have come again, or be in the queue when the consumer has ended.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = stage.consumer.metrics().await.unwrap();
        let received = metrics.count("ingest_received_total");
        if received >= 301 && metrics.count("ingest_acknowledged_total") == received {
            assert_eq!(metrics.labelled("rabbitmq_dead_lettered_total", "way", "rejected"), Some(1.0));
            assert_eq!(metrics.count("rabbitmq_reconnects_total"), 0);
            assert_eq!(metrics.count("rabbitmq_stale_acknowledgements_total"), 0);
            break;
        }
        assert!(Instant::now() < deadline, "not all is acknowledged");
        sleep(Duration::from_millis(20)).await;
    }
    stage.consumer.terminate(PATIENCE).await.unwrap();
    assert_eq!(stage.waiting(QUEUE).await, 0);
    stage.broker.control(&["set_vm_memory_high_watermark", "0.4"]).await.unwrap();
    let letters = stage.settings(QUEUE).dead_letter_queue();
    let deadline = Instant::now() + PATIENCE;
    while stage.waiting(&letters).await < 3 {
        assert!(Instant::now() < deadline, "the dead letters are not with the broker");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn another_name_another_kind_and_a_queue_that_does_not_fit() {
    let stage = Stage::new(Options::alone(), |launch| {
        launch.set("rabbitmq.queue", "webapp_active_users").set("rabbitmq.queue_type", "classic")
    })
    .await;
    let publisher = stage.publisher("webapp_active_users").await;
    publisher.publish(events(0, 200)).await;
    stage.until(SESSIONS, 200).await;

    // The same queue as a quorum queue: a clear error and an end, not a loop.
    let launch = Launch::new("rabbitmq-consumer").named("misfit").envs(stage.cluster.writer_environment());
    let launch = launch.envs(stage.broker.environment()).set("rabbitmq.queue", "webapp_active_users");
    let mut misfit = launch.clone().start(stage.scratch.path()).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while misfit.ended().is_none() {
        assert!(Instant::now() < deadline, "it does not end");
        sleep(Duration::from_millis(20)).await;
    }
    let log = std::fs::read_to_string(misfit.log()).unwrap();
    assert!(log.contains("rabbitmq.queue_type") && log.contains("webapp_active_users"), "{log}");

    // Used as it is, on demand.
    let mut second =
        launch.named("as-it-is").set("rabbitmq.declare", "false").start(stage.scratch.path()).await.unwrap();
    second.ready(PATIENCE).await.unwrap();
    publisher.publish(events(200, 400)).await;
    stage.until(SESSIONS, 400).await;
}

#[tokio::test]
async fn messages_go_back_to_the_queue_when_the_database_stays_away() {
    let mut stage = Stage::new(Options::alone(), |launch| {
        launch.set("database.commit_timeout", "1s").set("rabbitmq_consumer.requeue_after", "2s")
    })
    .await;
    let publisher = stage.publisher(QUEUE).await;
    stage.cluster.primary_mut().kill9(Reach::Tree).await.unwrap();
    publisher.publish(events(0, 500)).await;
    let deadline = Instant::now() + PATIENCE;
    while stage.consumer.metrics().await.unwrap().count("rabbitmq_requeued_total") == 0 {
        assert!(Instant::now() < deadline, "nothing is given back");
        sleep(Duration::from_millis(50)).await;
    }
    let deadline = Instant::now() + PATIENCE;
    while stage.waiting(QUEUE).await < 1_000 {
        assert!(Instant::now() < deadline, "the messages are not back in the queue");
        sleep(Duration::from_millis(50)).await;
    }
    stage.cluster.primary_mut().start().await.unwrap();
    stage.until(SESSIONS, 500).await;
    stage.until_acknowledged().await;
}
