//! A member of a shared subscription that leaves for good, packet by packet and at a real broker.

use bytes::BytesMut;
use playground::cluster::Options;
use playground::program::{Launch, Program};
use rumqttc::v5::mqttbytes::v5::{Packet, Publish};
use rumqttc::v5::{Event, EventLoop, MqttOptions};
use tokio::time::{Instant, timeout};

use crate::fake_broker::{Rig, message};
use crate::floor::{Floor, PATIENCE, READINGS};
use crate::scale_out::member;

const FILTER: &str = "og/field/#";
const SHARED: &str = "$share/ingest/og/field/#";
const TOPIC: &str = "tier0/leave/tier0-mqtt-consumer";
/// Unsubscribed; was not subscribed.
const DONE: u8 = 0;
const NOTHING: u8 = 0x11;

/// The marker as the broker hands it back.
fn handed_back(marker: &Publish, id: u16) -> BytesMut {
    let mut bytes = BytesMut::new();
    Publish { pkid: id, ..marker.clone() }.write(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn the_session_ends_when_all_that_was_dealt_to_it_is_committed_and_not_before() {
    let mut rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    assert_eq!(session.unsubscribing(true).await, [FILTER]);
    // Dealt before the broker unsubscribed it, and queued behind that.
    session.publish([1, 2]).await;
    let marker = session.marker(DONE).await;
    assert_eq!(marker.topic, TOPIC);
    session.publish([3]).await;
    let mut taken = rig.take_all(3).await;
    session.send(&handed_back(&marker, 4)).await;
    assert_eq!(session.puback().await, 4);
    // Everything has come, two of three are not committed: the session stays.
    rig.settle(taken.remove(0));
    assert_eq!(session.puback().await, 1);
    session.nothing_but_a_ping().await;
    taken.into_iter().for_each(|taken| rig.settle(taken));
    assert_eq!(session.pubacks(2).await, [2, 3]);
    let goodbye = async {
        let Some(Packet::Disconnect(goodbye)) = session.not_a_ping().await else {
            panic!("DISCONNECT expected")
        };
        assert_eq!(goodbye.properties.unwrap().session_expiry_interval, Some(0));
        drop(session);
    };
    let (outcome, ()) = tokio::join!(rig.ended(), goodbye);
    outcome.unwrap();
}

#[tokio::test]
async fn a_lost_connection_begins_again_and_a_foreign_marker_says_nothing() {
    let mut rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    session.publish([1]).await;
    session.marker(DONE).await;
    let old = rig.take().await;
    drop(session);
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    let marker = session.marker(NOTHING).await;
    // One that a process before this left behind; then what the lost connection had not acknowledged.
    session.send(&handed_back(&Publish { payload: "0123".into(), ..marker.clone() }, 9)).await;
    assert_eq!(session.puback().await, 9);
    session.publish([1]).await;
    let again = rig.take().await;
    rig.settle(old);
    rig.settle(again);
    assert_eq!(session.puback().await, 1);
    // The broker's queue was full when the marker came, so it is gone: another one comes.
    let marker = loop {
        match session.next().await {
            Some(Packet::PingReq(_)) => {}
            Some(Packet::Publish(marker)) => break marker,
            other => panic!("a marker expected, not {other:?}"),
        }
    };
    session.send(&handed_back(&marker, 2)).await;
    assert_eq!(session.puback().await, 2);
    let goodbye = async {
        assert!(matches!(session.not_a_ping().await, Some(Packet::Disconnect(_))));
        drop(session);
    };
    let (outcome, ()) = tokio::join!(rig.ended(), goodbye);
    outcome.unwrap();
}

#[tokio::test]
async fn what_cannot_be_left_is_named_and_kept() {
    // Never subscribed so; nor after an interrupted --leave: which filter that one had is not known.
    let rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    session.send(&[0xb0, 4, 0, 2, 0, NOTHING]).await;
    let (outcome, ()) = tokio::join!(rig.ended(), session.ended());
    let error = outcome.unwrap_err().to_string();
    assert!(
        error.contains("not subscribed to og/field/#") && error.contains("mqtt_consumer.filter"),
        "{error}"
    );

    // Subscribed to something else too: a reading behind the marker.
    let mut rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    let marker = session.marker(DONE).await;
    session.send(&[handed_back(&marker, 1), message(2)].concat()).await;
    let taken = rig.take().await;
    rig.settle(taken);
    assert_eq!(session.pubacks(2).await, [1, 2]);
    let (outcome, ()) = tokio::join!(rig.ended(), session.ended());
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("another subscription"), "{error}");

    // The same, and the reading comes while what was dealt is committed, or after it.
    for late in [false, true] {
        let mut rig = Rig::leaving().await;
        let mut session = rig.broker.accept().await;
        session.unsubscribing(true).await;
        session.publish([1]).await;
        let marker = session.marker(DONE).await;
        session.send(&handed_back(&marker, 2)).await;
        assert_eq!(session.puback().await, 2);
        let taken = rig.take().await;
        if !late {
            session.send(&message(3)).await;
        }
        rig.settle(taken);
        assert_eq!(session.puback().await, 1);
        let dealt = async {
            if late {
                // Before the answer to the ping that asks for it.
                session.send(&message(3)).await;
            }
            session.ended().await;
        };
        let (outcome, ()) = tokio::join!(rig.ended(), dealt);
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("another subscription") && error.contains("is kept"), "{error}");
    }

    // The broker forgets the session in between, and what it held.
    let rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    session.marker(DONE).await;
    drop(session);
    let mut session = rig.broker.accept().await;
    session.connect().await;
    session.send(&[0x20, 3, 0, 0, 0]).await;
    let goodbye = async {
        assert!(matches!(session.not_a_ping().await, Some(Packet::Disconnect(_))));
        drop(session);
    };
    let (outcome, ()) = tokio::join!(rig.ended(), goodbye);
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("has lost the session"), "{error}");

    // The member still runs.
    let rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    session.send(&[0xe0, 2, 0x8e, 0]).await;
    let error = rig.ended().await.unwrap_err().to_string();
    assert!(error.contains("stop it before"), "{error}");

    // Not allowed to listen to its marker.
    let rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    session.send(&[0xb0, 4, 0, 2, 0, DONE]).await;
    assert!(matches!(session.next().await, Some(Packet::Subscribe(_))));
    session.grant(0x87).await;
    let error = rig.ended().await.unwrap_err().to_string();
    assert!(error.contains(TOPIC) && error.contains("not authorized"), "{error}");

    // Asked to end before it has left.
    let rig = Rig::leaving().await;
    let mut session = rig.broker.accept().await;
    session.unsubscribing(true).await;
    session.marker(DONE).await;
    rig.shutdown.cancel();
    let (outcome, ()) = tokio::join!(rig.ended(), session.ended());
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("start the member once more"), "{error}");
}

/// Whether the broker has a session under this client id. Looking makes none.
async fn has_session(floor: &Floor, client_id: &str) -> bool {
    let mut options = MqttOptions::new(client_id, "127.0.0.1", floor.broker.port());
    options.set_clean_start(false);
    let mut events = EventLoop::new(options, 10);
    loop {
        let event = timeout(PATIENCE, events.poll()).await.expect("the broker answers").unwrap();
        if let Event::Incoming(Packet::ConnAck(answer)) = event {
            return answer.session_present;
        }
    }
}

async fn leave(floor: &Floor, name: &'static str, filter: &str) -> Program {
    let launch = |launch: Launch| {
        let launch = member(name)(launch).named(&format!("{name}-leaves")).args(["--leave"]);
        let launch = launch.set("mqtt_consumer.filter", filter);
        // Far less than what waits: the broker's queue must be emptied, not only what is in flight.
        launch.set("mqtt_consumer.receive_maximum", 100).set("ingest.max_rows", 100)
    };
    floor.start(launch).await
}

#[tokio::test]
async fn a_member_leaves_under_load_and_its_part_is_stored() {
    let floor = Floor::new(Options::alone(), member("member-a")).await;
    let mut other = floor.another(member("member-b")).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 1_000);
    publisher.accepted().await;
    other.terminate(PATIENCE).await.unwrap();
    publisher.publish_readings(1_000, 5_000);
    publisher.accepted().await;
    let rows: i64 = floor.db().await.query_one(READINGS, &[]).await.unwrap().get(0);
    assert!(rows < 4_500, "the broker deals to the member that is away too: {rows} of 5000");

    // With another filter it would end a session that is still dealt to.
    let mut wrong = leave(&floor, "member-b", FILTER).await;
    let status = wrong.wait(PATIENCE).await.unwrap();
    let log = std::fs::read_to_string(wrong.log()).unwrap();
    assert!(status.code() == Some(1) && log.contains("not subscribed to og/field/#"), "{log}");

    let mut leaving = leave(&floor, "member-b", SHARED).await;
    let mut sent = 5_000;
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        // The devices go on meanwhile.
        publisher.publish_readings(sent, sent + 100);
        publisher.accepted().await;
        sent += 100;
        if let Some(status) = leaving.ended() {
            break status;
        }
        assert!(Instant::now() < deadline, "it does not leave{}", playground::child::tail(leaving.log(), 40));
    };
    let log = std::fs::read_to_string(leaving.log()).unwrap();
    assert!(status.success() && log.contains("its session is empty and ended"), "{log}");
    publisher.publish_readings(sent, sent + 1_000);
    publisher.accepted().await;
    floor.until(READINGS, sent as i64 + 1_000).await;
    assert!(!has_session(&floor, "member-b").await);

    // A session that was ended on purpose is not missed.
    floor
        .until("SELECT count(*) FROM mqtt_sessions WHERE client_id = 'member-b' AND ended_at IS NOT NULL", 1)
        .await;

    // There is nothing to leave twice, and saying so leaves nothing behind.
    let mut again = leave(&floor, "member-b", SHARED).await;
    let status = again.wait(PATIENCE).await.unwrap();
    let log = std::fs::read_to_string(again.log()).unwrap();
    assert!(status.code() == Some(1) && log.contains("holds no session of client id member-b"), "{log}");
    assert!(!has_session(&floor, "member-b").await);
}
