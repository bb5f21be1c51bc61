//! What the source makes of each answer of a broker: what it says, what it does, what it counts.

use std::time::Duration;

use bytes::BufMut;
use bytesize::ByteSize;
use rumqttc::v5::mqttbytes::v5::Packet;
use tokio::time::Instant;

use crate::fake_broker::{Rig, message};

/// CONNACK, success, with these properties.
fn granted(properties: &[u8]) -> Vec<u8> {
    let length = u8::try_from(properties.len()).unwrap();
    [&[0x20, 3 + length, 0, 0, length], properties].concat()
}

#[tokio::test]
async fn an_answer_to_connect_that_will_not_do_is_said_with_what_to_do() {
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (vec![0x20, 2, 0, 1], "MQTT 3.1.1 (unacceptable protocol version", "refused"),
        (vec![0x20, 2, 0, 0], "needs MQTT 5", "refused"),
        (vec![0x20, 3, 0, 0x86, 0], "Check mqtt.username and mqtt.password", "refused"),
        (vec![0x20, 2, 0, 0x8a], "banned", "refused"),
        (b"\x20\x0a\0\x9d\x07\x1c\0\x04b.io".to_vec(), "names another server: b.io", "refused"),
        (granted(&[0x24, 0]), "maximum QoS is 0", "unusable"),
        (granted(&[0x11, 0, 0, 0, 0]), "would forget the session", "unusable"),
        (granted(b"\x12\0\x04auto"), "another client id (auto)", "unusable"),
        (granted(&[0x28, 0]), "no wildcard subscriptions", "unusable"),
        // SUBSCRIBE of ours has 18 bytes.
        (granted(&[0x27, 0, 0, 0, 17]), "at most 17 bytes", "unusable"),
        (vec![0x20, 3, 0, 0, 7], "CONNACK: its properties are longer than the packet", "protocol"),
        (vec![0xe0, 1, 0x97], "quota exceeded (reason 0x97). Raise the broker's limit", "disconnected"),
        (vec![0xd0, 0], "no MQTT broker answers: the first bytes are", "not_mqtt"),
        (vec![0xf0, 2, 0x18, 0], "it sent AUTH", "protocol"),
        (b"\x15\x03\x03\0\x02\x02\x46".to_vec(), "it speaks TLS", "not_mqtt"),
        (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "it is an HTTP server", "not_mqtt"),
        (b"AMQP\0\0\x09\x01".to_vec(), "it speaks AMQP", "not_mqtt"),
        (vec![], "closed the connection without an answer", "not_mqtt"),
    ];
    for (answer, words, reason) in cases {
        let rig = Rig::new().await;
        let mut session = rig.broker.accept().await;
        session.connect().await;
        session.send(&answer).await;
        if answer.is_empty() {
            drop(session);
        } else {
            session.ended().await;
        }
        rig.until_problem(words).await;
        assert_eq!((rig.ended_by(reason), rig.source_metrics.connected.get()), (1, 0), "{words}");
        // Not subscribed, so it did not end early; and tried again.
        assert_eq!(rig.source_metrics.connections_ended_early.get(), 0, "{words}");
        drop(rig.broker.subscribed().await);
        rig.end().await;
    }
}

#[tokio::test]
async fn the_brokers_keep_alive_holds_instead_of_ours() {
    // Ours is ten minutes: a ping within it, but long after the broker has lost patience.
    let rig = Rig::with(10, |mqtt| mqtt.keep_alive = Duration::from_secs(600)).await;
    let mut session = rig.broker.accept().await;
    session.connect().await;
    session.send(&granted(&[0x13, 0, 2])).await;
    assert!(matches!(session.next().await, Some(Packet::Subscribe(_))));
    session.grant(1).await;
    let started = Instant::now();
    session.nothing_but_a_ping().await;
    session.nothing_but_a_ping().await;
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    rig.end().await;
}

#[tokio::test]
async fn a_broker_that_never_confirms_is_given_up_in_time_whatever_its_keep_alive() {
    let rig = Rig::with(10, |mqtt| {
        (mqtt.connect_timeout, mqtt.keep_alive) = (Duration::from_millis(300), Duration::from_secs(300));
    })
    .await;
    let session = rig.broker.connected().await;
    rig.until_problem("no answer to SUBSCRIBE in time").await;
    session.ended().await;
    rig.end().await;
}

#[tokio::test]
async fn every_form_of_goodbye_is_understood() {
    let cases: [(&[u8], &str, &str); 5] = [
        // As Mosquitto sends it: without properties.
        (&[0xe0, 1, 0x8e], "another process uses client id tier0-mqtt-consumer", "taken_over"),
        (&[0xe0, 1, 0x8b], "server shutting down (reason 0x8b)", "disconnected"),
        (&[0xe0, 1, 0x93], "Lower mqtt_consumer.receive_maximum", "disconnected"),
        (
            b"\xe0\x09\x98\x07\x1f\0\x04bye!",
            "administrative action (reason 0x98), the broker says: bye!",
            "disconnected",
        ),
        (&[0xe0, 1, 0x77], "a reason that MQTT 5 does not know (reason 0x77)", "disconnected"),
    ];
    for (goodbye, words, reason) in cases {
        let rig = Rig::new().await;
        let mut session = rig.broker.subscribed().await;
        rig.until_ready().await;
        session.send(goodbye).await;
        session.ended().await;
        rig.until_problem(words).await;
        assert_eq!(rig.ended_by(reason), 1, "{words}");
        rig.end().await;
    }
}

#[tokio::test]
async fn after_a_takeover_it_waits_and_is_ready_only_when_it_has_lasted() {
    let rig = Rig::new().await;
    let mut previous = None;
    let mut waits = Vec::new();
    for _ in 0..3 {
        let mut session = rig.broker.subscribed().await;
        if let Some(previous) = previous {
            waits.push(Instant::duration_since(&Instant::now(), previous));
            assert!(
                rig.problem().is_some_and(|problem| problem.contains("another process")),
                "not known who keeps it"
            );
        }
        session.send(&[0xe0, 1, 0x8e]).await;
        session.ended().await;
        previous = Some(Instant::now());
    }
    // From the upper half of 1 s and of 2 s.
    assert!(waits[0] >= Duration::from_millis(450) && waits[1] >= Duration::from_millis(950), "{waits:?}");
    assert_eq!((rig.ended_by("taken_over"), rig.source_metrics.connections_ended_early.get()), (3, 3));
    // The other one is gone: this connection lasts.
    let mut session = rig.broker.subscribed().await;
    while rig.problem().is_some() {
        session.nothing_but_a_ping().await;
    }
    rig.end().await;
}

#[tokio::test]
async fn a_message_at_qos_2_is_taken_committed_and_released() {
    let mut rig = Rig::new().await;
    let mut session = rig.broker.subscribed().await;
    // QoS 2, twice with the same id: the broker repeats what it has not seen answered.
    session.send(b"\x34\x08\0\x01t\0\x07\0{}").await;
    session.send(b"\x3c\x08\0\x01t\0\x07\0{}").await;
    let taken = rig.take_all(2).await;
    taken.into_iter().for_each(|taken| rig.settle(taken));
    // PUBREC after the commit, and PUBCOMP for each PUBREL, known or not.
    session.bytes(&[0x50, 2, 0, 7, 0x50, 2, 0, 7]).await;
    session.send(&[0x62, 2, 0, 7, 0x62, 2, 0, 99]).await;
    session.bytes(&[0x70, 2, 0, 7, 0x70, 2, 0, 99]).await;
    // Retained, and again with DUP at QoS 1: ordinary messages.
    session.send(b"\x33\x08\0\x01t\0\x08\0{}\x3a\x08\0\x01t\0\x09\0{}").await;
    let taken = rig.take_all(2).await;
    taken.into_iter().for_each(|taken| rig.settle(taken));
    assert_eq!(session.pubacks(2).await, [8, 9]);
    rig.end().await;
}

#[tokio::test]
async fn a_poison_packet_is_handed_on_as_such_and_does_not_stop_its_neighbours() {
    let mut rig = Rig::new().await;
    let mut session = rig.broker.subscribed().await;
    // Its properties are said to be longer than the packet.
    let poison = b"\x32\x06\0\x01t\0\x02\x55";
    session.send(&[&message(1), &poison[..], &message(3)].concat()).await;
    let taken = rig.take_all(3).await;
    assert_eq!([taken[0].text.as_str(), taken[2].text.as_str()], ["1", "3"]);
    assert_eq!((taken[0].malformed, taken[2].malformed), (None, None));
    assert!(taken[1].malformed.unwrap().contains("properties are longer"));
    assert_eq!(taken[1].text.as_bytes(), poison);
    taken.into_iter().for_each(|taken| rig.settle(taken));
    assert_eq!(session.pubacks(3).await, [1, 2, 3]);
    assert_eq!(rig.source_metrics.reconnects.get(), 0);
    rig.end().await;
}

/// Topic and payload of a message are slices of what was read, so its properties stay in memory as long as they do.
#[tokio::test]
async fn the_queue_counts_what_a_message_holds_and_not_only_what_it_says() {
    const EACH: usize = 60_000;
    const MESSAGES: u16 = 200;
    let rig = Rig::set(|settings| settings.max_packet = ByteSize::mib(1)).await;
    let mut session = rig.broker.subscribed().await;
    let mut bytes = Vec::new();
    for id in 1..=MESSAGES {
        // Empty user properties, one byte of payload.
        let properties = [38, 0, 0, 0, 0].repeat(EACH / 5);
        let remaining = 3 + 2 + 3 + properties.len() + 1;
        bytes.put_u8(0x32);
        for (shift, more) in [(0, 0x80), (7, 0x80), (14, 0)] {
            bytes.put_u8((remaining >> shift & 0x7f) as u8 | more);
        }
        bytes.put_slice(&[0, 1, b't']);
        bytes.put_u16(id);
        for (shift, more) in [(0, 0x80), (7, 0x80), (14, 0)] {
            bytes.put_u8((properties.len() >> shift & 0x7f) as u8 | more);
        }
        bytes.put_slice(&properties);
        bytes.put_u8(b'x');
    }
    // The queue takes 1 MiB. What the source does not read may fit into the sockets' buffers, or not.
    let send = async {
        session.send(&bytes).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = send => {}
        () = rig.until(|| rig.source_metrics.paused.get() > 0, "paused") => {}
    }
    // The bound, one read and one packet over.
    let bound = (1 << 20) + (256 << 10) + EACH;
    assert!((1 << 20..=bound).contains(&rig.held_bytes()), "{} bytes", rig.held_bytes());
    assert!(rig.held() * EACH <= bound, "{} messages", rig.held());
}

#[tokio::test]
async fn a_session_that_should_be_there_and_is_not_is_counted() {
    let rig = Rig::new().await;
    let mut session = rig.broker.subscribed().await;
    rig.until_ready().await;
    assert_eq!(rig.source_metrics.sessions_lost.get(), 0, "the first session of a client id is not missed");
    assert!(rig.sessions.watch().borrow().subscribed);
    session.send(&[0xe0, 1, 0x8b]).await;
    session.ended().await;
    // It comes back with the session, then without.
    let mut session = rig.broker.accept().await;
    session.connect().await;
    session.send(&[0x20, 3, 1, 0, 0]).await;
    assert!(matches!(session.next().await, Some(Packet::Subscribe(_))));
    assert_eq!(rig.source_metrics.sessions_lost.get(), 0);
    drop(session);
    drop(rig.broker.subscribed().await);
    assert_eq!(rig.source_metrics.sessions_lost.get(), 1);
    assert!(rig.source_metrics.session_lost_at.get() > 1.7e9);
    assert!(rig.sessions.watch().borrow().lost_at.is_some());
    rig.end().await;
}

#[tokio::test]
async fn a_shorter_session_than_asked_is_taken_and_shown() {
    let rig = Rig::new().await;
    let mut session = rig.broker.accept().await;
    session.connect().await;
    session.send(&granted(&[0x11, 0, 0, 0, 60])).await;
    assert!(matches!(session.next().await, Some(Packet::Subscribe(_))));
    session.grant(1).await;
    rig.until_ready().await;
    assert_eq!(rig.source_metrics.session_expiry.get(), 60);
    rig.end().await;
}
