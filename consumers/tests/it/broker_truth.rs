//! What a real broker answers when it is asked wrongly, forgets, or is no broker at all.

use std::path::Path;
use std::process::Command;

use playground::cluster::Options;
use playground::port::Port;
use playground::program::{Launch, Program};
use playground::rabbitmq::RabbitMq;
use tokio::time::{Instant, sleep};

use crate::fake_broker::FakeBroker;
use crate::floor::{Floor, PATIENCE, READINGS, until_metric};

const EVERY_MOMENT: std::time::Duration = std::time::Duration::from_millis(20);

fn log_of(program: &Program) -> String {
    std::fs::read_to_string(program.log()).unwrap()
}

async fn until_log(program: &Program, words: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !log_of(program).contains(words) {
        assert!(Instant::now() < deadline, "{} does not say {words}:\n{}", program.name(), log_of(program));
        sleep(EVERY_MOMENT).await;
    }
}

#[tokio::test]
async fn two_consumers_with_one_client_id_both_say_so_and_do_not_fight() {
    let floor = Floor::new(Options::alone(), |launch| launch).await;
    let second = floor.start(|launch: Launch| launch.named("second")).await;
    const SAID: &str = "another process uses client id tier0-mqtt-consumer";
    until_log(&floor.consumer, SAID).await;
    until_log(&second, SAID).await;
    // Each change of hands is one line. Twelve a second it was; now the waits grow.
    let watched = std::time::Duration::from_secs(20);
    sleep(watched).await;
    let mut taken_over = 0.0;
    for program in [&floor.consumer, &second] {
        let metrics = program.metrics().await.unwrap();
        taken_over += metrics.labelled("mqtt_connections_ended_total", "reason", "taken_over").unwrap();
    }
    assert!((2.0..=12.0).contains(&taken_over), "{taken_over} changes in {watched:?}");
    // Nothing is lost meanwhile.
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 1_000);
    publisher.accepted().await;
    floor.until(READINGS, 1_000).await;
}

#[tokio::test]
async fn a_session_that_the_broker_lost_while_nobody_ran_is_noticed() {
    let mut floor = Floor::new(Options::alone(), |launch| launch).await;
    assert!(!log_of(&floor.consumer).contains("has lost the session"));
    floor
        .until("SELECT count(*) FROM mqtt_sessions WHERE filter = 'og/field/#' AND lost_at IS NULL", 1)
        .await;
    // A restart is not a loss.
    floor.consumer.terminate(PATIENCE).await.unwrap();
    floor.broker.restart().await.unwrap();
    floor.consumer.restart().await.unwrap();
    floor.consumer.ready(PATIENCE).await.unwrap();
    assert_eq!(floor.consumer.metrics().await.unwrap().count("mqtt_sessions_lost_total"), 0);
    // The broker's data is gone.
    floor.consumer.terminate(PATIENCE).await.unwrap();
    floor.broker.stop().await.unwrap();
    std::fs::remove_file(floor.scratch().path().join("mosquitto/mosquitto.db")).unwrap();
    floor.broker.start_again().await.unwrap();
    floor.consumer.restart().await.unwrap();
    floor.consumer.ready(PATIENCE).await.unwrap();
    until_log(&floor.consumer, "has lost the session").await;
    until_metric(&floor.consumer, "mqtt_sessions_lost_total", 1).await;
    floor.until("SELECT count(*) FROM mqtt_sessions WHERE lost_at IS NOT NULL", 1).await;
    // The next process knows when, and does not miss the new session.
    floor.consumer.terminate(PATIENCE).await.unwrap();
    floor.consumer.restart().await.unwrap();
    floor.consumer.ready(PATIENCE).await.unwrap();
    until_metric(&floor.consumer, "mqtt_session_lost_timestamp_seconds", 1_770_000_000).await;
    assert_eq!(floor.consumer.metrics().await.unwrap().count("mqtt_sessions_lost_total"), 0);
}

/// Somebody has given the consumer another client id: the broker goes on to fill the session of the former one.
#[tokio::test]
async fn a_session_that_was_left_under_another_client_id_is_named() {
    let mut floor = Floor::new(Options::alone(), |launch| launch).await;
    let recorded = "SELECT count(*) FROM mqtt_sessions WHERE client_id = 'tier0-mqtt-consumer'";
    floor.until(recorded, 1).await;
    floor.consumer.terminate(PATIENCE).await.unwrap();
    let late = "UPDATE mqtt_sessions SET last_seen = last_seen - interval '10 minutes'";
    floor.db().await.batch_execute(late).await.unwrap();
    let other =
        floor.start(|launch: Launch| launch.named("other").set("mqtt_consumer.client_id", "other")).await;
    until_log(&other, "no consumer uses any more").await;
    until_log(&other, "tier0-mqtt-consumer").await;
    // One that left for good is not missed.
    floor.db().await.batch_execute("UPDATE mqtt_sessions SET ended_at = now()").await.unwrap();
    let third =
        floor.another(|launch: Launch| launch.named("third").set("mqtt_consumer.client_id", "third")).await;
    assert!(!log_of(&third).contains("no consumer uses any more"));
}

/// A session keeps what it was subscribed to. Ending it to change that would lose what devices publish meanwhile.
#[tokio::test]
async fn another_filter_takes_the_place_of_the_former_one_and_nothing_is_lost_or_comes_twice() {
    const SHARED: &str = "$share/ingest/og/field/#";
    let mut floor = Floor::new(Options::alone(), |launch| launch).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 100);
    publisher.accepted().await;
    floor.until(READINGS, 100).await;
    floor
        .until("SELECT count(*) FROM mqtt_sessions WHERE filter = 'og/field/#' AND ended_at IS NULL", 1)
        .await;
    floor.consumer.terminate(PATIENCE).await.unwrap();
    publisher.publish_readings(100, 200);
    publisher.accepted().await;
    let mut changed =
        floor.start(|launch: Launch| launch.named("changed").set("mqtt_consumer.filter", SHARED)).await;
    floor.until(READINGS, 200).await;
    until_log(&changed, "the subscription to the former mqtt_consumer.filter is ended").await;
    floor.until("SELECT count(*) FROM mqtt_sessions WHERE filter = '$share/ingest/og/field/#'", 1).await;
    publisher.publish_readings(200, 300);
    publisher.accepted().await;
    floor.until(READINGS, 300).await;
    until_metric(&changed, "ingest_acknowledged_total", 200).await;
    assert_eq!(changed.metrics().await.unwrap().count("ingest_received_total"), 200, "each once");
    changed.terminate(PATIENCE).await.unwrap();
    // Nothing deals to the session but the filter that --leave names.
    let mut leaving = floor
        .start(|launch: Launch| launch.named("leaving").set("mqtt_consumer.filter", SHARED).args(["--leave"]))
        .await;
    let status = leaving.wait(PATIENCE).await.unwrap();
    assert!(status.success(), "{}", log_of(&leaving));
}

fn self_signed(dir: &Path, port: u16) -> Vec<String> {
    let (key, certificate) = (dir.join("key.pem"), dir.join("certificate.pem"));
    let output = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-keyout",
        ])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .expect("openssl is installed");
    assert!(output.status.success(), "{output:?}");
    // The broker's own account reads them.
    for file in [&key, &certificate] {
        std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    }
    vec![
        format!("listener {port} 127.0.0.1"),
        format!("certfile {}", certificate.display()),
        format!("keyfile {}", key.display()),
    ]
}

#[tokio::test]
async fn a_port_that_is_no_mqtt_listener_is_named_for_what_it_is() {
    let (tls, strict) = (Port::free().unwrap(), Port::free().unwrap());
    let extra = |dir: &Path| {
        let mut lines = self_signed(dir, tls.number());
        lines.extend([format!("listener {} 127.0.0.1", strict.number()), "max_qos 0".into()]);
        lines
    };
    let floor = Floor::with_broker(Options::alone(), extra, |launch| launch).await;
    let rabbitmq = RabbitMq::start(floor.scratch(), &[]).await.unwrap();
    let postgres = floor.cluster.primary().port();
    for (name, port, words) in [
        // Mosquitto 2.0.11 resets the connection; the alert that others send is in the table of broker_answers.
        ("tls", tls.number(), "Check that mqtt.port is an MQTT listener without TLS"),
        ("http", floor.consumer.port(), "it is an HTTP server"),
        ("amqp", rabbitmq.port(), "it speaks AMQP"),
        ("postgres", postgres, "closed the connection without an answer"),
        ("qos", strict.number(), "maximum QoS is 0"),
    ] {
        let launch = |launch: Launch| launch.named(name).set("mqtt.port", port);
        let mut wrong = floor.start(launch).await;
        until_log(&wrong, words).await;
        wrong.kill9().await.unwrap();
    }
}

/// The most memory that the process ever held, in bytes.
fn peak_memory(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.pid().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn what_a_hostile_device_can_put_into_one_packet_costs_its_size_and_stops_nobody() {
    let floor = Floor::new(Options::alone(), |launch| launch).await;
    let broker = FakeBroker::new().await;
    let port = broker.settings().port;
    let consumer = floor.start(|launch: Launch| launch.named("hostile").set("mqtt.port", port)).await;
    let mut session = broker.subscribed().await;
    // 3.3 million empty user properties, then a payload that is no reading.
    let properties = [38, 0, 0, 0, 0].repeat(3_300_000);
    let variable = |mut value: usize| {
        let mut bytes = Vec::new();
        while value > 127 {
            bytes.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    };
    let body = [&b"\0\x0eog/field/S/T/D\0\x01"[..], &variable(properties.len()), &properties, b"x"].concat();
    let packet = [&[0x32][..], &variable(body.len()), &body].concat();
    // Beside it one whose properties are cut, and its neighbours.
    session.send(&[&packet[..], b"\x32\x06\0\x01t\0\x02\x55", b"\x32\x07\0\x01t\0\x03\0x"].concat()).await;
    assert_eq!(session.pubacks(3).await, [1, 2, 3]);
    floor.until("SELECT count(*) FROM dead_letters", 3).await;
    let sql = "SELECT count(*) FROM dead_letters WHERE reason = 'malformed_packet' AND topic = 't' \
               AND error LIKE '%properties are longer%' AND payload = '\\x3206000174000255'";
    floor.until(sql, 1).await;
    let peak = peak_memory(&consumer);
    assert!(peak < 100 << 20, "{} MiB", peak >> 20);
}
