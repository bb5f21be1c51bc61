//! What the MQTT source sends to a broker, packet by packet, and what it makes of what a broker must not do.

use std::time::Duration;

use rumqttc::v5::mqttbytes::v5::Packet;

use crate::fake_broker::{Rig, message};

#[tokio::test]
async fn the_session_is_asked_for_as_promised() {
    let rig = Rig::new().await;
    let mut session = rig.broker.accept().await;
    let connect = session.connect().await;
    assert_eq!((connect.client_id.as_str(), connect.clean_start), ("tier0-mqtt-consumer", false));
    let properties = connect.properties.unwrap();
    assert_eq!(properties.session_expiry_interval, Some(7 * 24 * 3600));
    assert_eq!((properties.receive_maximum, properties.max_packet_size), (Some(60_000), Some(1024)));
    session.send(&[0x20, 3, 0, 0, 0]).await;
    let Some(Packet::Subscribe(subscribe)) = session.next().await else { panic!("SUBSCRIBE expected") };
    assert_eq!(subscribe.filters[0].path, "og/field/#");
    assert!(rig.problem().is_some(), "not ready before the subscription is confirmed");
    session.grant(1).await;
    rig.until_ready().await;
    rig.end().await;
}

#[tokio::test]
async fn acknowledgements_leave_in_order_of_receipt_and_only_for_settled_prefixes() {
    let mut rig = Rig::new().await;
    let mut session = rig.broker.subscribed().await;
    // The broker chooses the ids; their order means nothing.
    let ids: Vec<u16> = (0..50).map(|n| 1 + n * 37 % 50).collect();
    session.publish(ids[..3].iter().copied()).await;
    let mut taken: Vec<_> = rig.take_all(3).await.into_iter().map(Some).collect();
    session.publish(ids[3..].iter().copied()).await;
    taken.extend(rig.take_all(47).await.into_iter().map(Some));
    let received: Vec<String> = taken.iter().map(|taken| taken.as_ref().unwrap().text.clone()).collect();
    assert_eq!(received, ids.iter().map(u16::to_string).collect::<Vec<_>>());

    // All but two are settled, in no order; nothing leaves beyond the first gap.
    for n in (0..50).map(|n| n * 23 % 50).filter(|n| ![5, 30].contains(n)) {
        rig.settle(taken[n].take().unwrap());
    }
    assert_eq!(session.pubacks(5).await, ids[..5]);
    session.nothing_but_a_ping().await;
    rig.settle(taken[30].take().unwrap());
    session.nothing_but_a_ping().await;
    rig.settle(taken[5].take().unwrap());
    assert_eq!(session.pubacks(45).await, ids[5..]);
    assert_eq!(rig.metrics.acknowledged.get(), 50);
    rig.end().await;
    session.ended().await;
}

#[tokio::test]
async fn what_an_earlier_connection_brought_is_never_acknowledged_on_a_new_one() {
    let mut rig = Rig::new().await;
    let mut session = rig.broker.subscribed().await;
    session.publish([1, 2, 3]).await;
    let old = rig.take_all(3).await;
    let [first, second, third]: [_; 3] = old.try_into().unwrap();
    rig.settle(first);
    assert_eq!(session.puback().await, 1);
    drop(session);

    // Settled while there is no connection, one not yet accepted, and one in use: void each time. The broker delivers
    // again; ids of the old connection stand for other messages now.
    let mut session = rig.broker.accept().await;
    rig.settle(second);
    session.connect().await;
    session.send(&[0x20, 3, 1, 0, 0]).await;
    assert!(matches!(session.next().await, Some(Packet::Subscribe(_))));
    session.grant(1).await;
    session.publish([3, 2, 7]).await;
    let new = rig.take_all(3).await;
    rig.settle(third);
    rig.until(|| rig.source_metrics.stale_acknowledgements.get() == 2, "two void acknowledgements").await;
    session.nothing_but_a_ping().await;
    for taken in new {
        rig.settle(taken);
    }
    assert_eq!(session.pubacks(3).await, [3, 2, 7]);
    assert_eq!(rig.metrics.acknowledged.get(), 4);
    rig.end().await;
    session.ended().await;
}

#[tokio::test]
async fn a_full_queue_stops_reading_but_neither_pings_nor_acknowledgements() {
    let mut rig = Rig::with(4, |_| {}).await;
    let mut session = rig.broker.subscribed().await;
    session.publish([1, 2, 3, 4]).await;
    let mut taken = rig.take_all(4).await;
    rig.until(|| rig.source_metrics.paused.get() == 1, "paused").await;
    session.publish([5, 6]).await;
    // Longer than the keep-alive of 2 s: what is not read says nothing about the broker.
    for _ in 0..3 {
        session.nothing_but_a_ping().await;
    }
    assert_eq!(rig.held(), 4, "nothing beyond the bound was read");
    let first = taken.remove(0);
    rig.free(&taken[0]);
    rig.settle(first);
    assert_eq!(session.puback().await, 1);
    // Room for one: reading resumes, with what the broker had sent meanwhile.
    let next = rig.take_all(2).await;
    assert_eq!([next[0].text.as_str(), next[1].text.as_str()], ["5", "6"]);
    session.nothing_but_a_ping().await;
    assert_eq!(rig.source_metrics.reconnects.get(), 0);
    rig.end().await;
}

#[tokio::test]
async fn acknowledgements_leave_while_reading_is_paused() {
    let mut rig = Rig::with(2, |_| {}).await;
    let mut session = rig.broker.subscribed().await;
    session.publish([1, 2]).await;
    let taken = rig.take_all(2).await;
    rig.until(|| rig.source_metrics.paused.get() == 1, "paused").await;
    session.publish([3]).await;
    for taken in taken {
        rig.settle(taken);
    }
    assert_eq!(session.pubacks(2).await, [1, 2]);
    session.nothing_but_a_ping().await;
    assert_eq!(rig.held(), 2, "still paused");
    rig.end().await;
}

#[tokio::test]
async fn a_refused_subscription_is_named_and_is_not_ready() {
    let mut rig = Rig::new().await;
    // Refused outright, and granted without a promise: QoS 0 would lose what is not yet committed.
    for (code, words) in [
        (0x87, "access rules (ACL)"),
        (0x9e, "a mqtt_consumer.filter without $share"),
        (0x00, "At QoS 0 the broker would drop what is not yet committed"),
    ] {
        let mut session = rig.broker.connected().await;
        session.grant(code).await;
        session.ended().await;
        rig.until_problem(words).await;
        assert!(rig.problem().unwrap().starts_with("the broker refuses the subscription"));
        assert_eq!(rig.source_metrics.connected.get(), 0);
    }
    let mut session = rig.broker.subscribed().await;
    rig.until_ready().await;
    session.publish([9]).await;
    let taken = rig.take().await;
    rig.settle(taken);
    assert_eq!(session.puback().await, 9);
    rig.end().await;
}

#[tokio::test]
async fn a_wrong_packet_ends_the_connection_and_costs_nothing_before_it() {
    let cases: [(&[u8], &str, &str); 9] = [
        (&[0x32, 0xd0, 0x0f, 0, 1, b't'], "2003 bytes, more than the 1024", "packet_too_large"),
        (&[0x00, 2, 0, 0], "reserved type 0", "protocol"),
        (&[0x32, 0xff, 0xff, 0xff, 0xff, 1], "more than four bytes", "protocol"),
        (&[0x32, 8, 0, 0, 0, 1, 3, 35, 0, 5], "topic alias", "protocol"),
        (&[0x20, 3, 0, 0, 0], "second CONNACK", "protocol"),
        // Answers that nobody waits for, and one with another id than ours.
        (&[0x90, 4, 0, 1, 0, 1], "unexpected SUBACK", "protocol"),
        (&[0x40, 2, 0, 3], "unexpected PUBACK", "protocol"),
        (&[0xe0, 2, 0x8e, 0], "another process uses client id tier0-mqtt-consumer", "taken_over"),
        (&[0xe0, 0], "success (reason 0x00)", "disconnected"),
    ];
    for (wrong, words, reason) in cases {
        let mut rig = Rig::new().await;
        let mut session = rig.broker.subscribed().await;
        rig.until_ready().await;
        // In one write, so that both are read together.
        session.send(&[&message(7), wrong].concat()).await;
        let taken = rig.take().await;
        session.ended().await;
        rig.until_problem(words).await;
        assert_eq!(
            (rig.ended_by(reason), rig.source_metrics.connections_ended_early.get()),
            (1, 1),
            "{words}"
        );
        rig.settle(taken);
        rig.until(|| rig.source_metrics.stale_acknowledgements.get() == 1, "void").await;
        assert_eq!(rig.metrics.acknowledged.get(), 0);
        rig.end().await;
    }
}

/// The broker would deliver it first on every connection: to end the connection over it is to acknowledge nothing ever.
#[tokio::test]
async fn a_message_that_cannot_be_acknowledged_holds_nobody_up() {
    let mut rig = Rig::new().await;
    let mut session = rig.broker.subscribed().await;
    rig.until_ready().await;
    // PUBLISH: packet id 0, a topic longer than the packet, no packet id, QoS 3.
    let wrong: [&[u8]; 4] = [
        &[0x32, 6, 0, 1, b't', 0, 0, 0],
        &[0x32, 6, 0, 200, b't', 0, 1, 0],
        &[0x32, 4, 0, 1, b't', 0],
        &[0x36, 6, 0, 1, b't', 0, 1, 0],
    ];
    session.send(&[&message(1)[..], &wrong.concat(), &message(2)].concat()).await;
    for taken in rig.take_all(2).await {
        rig.settle(taken);
    }
    assert_eq!(session.pubacks(2).await, [1, 2]);
    assert_eq!(rig.source_metrics.unanswerable.get(), 4);
    session.nothing_but_a_ping().await;
    rig.end().await;
}

#[tokio::test]
async fn a_broker_that_never_answers_is_given_up_in_time() {
    let rig = Rig::with(10, |mqtt| mqtt.connect_timeout = Duration::from_millis(300)).await;
    // Takes the TCP connection and the CONNECT.
    let mut session = rig.broker.accept().await;
    session.connect().await;
    rig.until_problem("no answer to CONNECT in time").await;
    session.ended().await;
    // Answers CONNECT, not SUBSCRIBE.
    let session = rig.broker.connected().await;
    rig.until_problem("no answer to SUBSCRIBE in time").await;
    session.ended().await;
    // Refuses.
    let mut session = rig.broker.accept().await;
    session.connect().await;
    session.send(&[0x20, 3, 0, 0x87, 0]).await;
    session.ended().await;
    rig.until_problem("refuses the connection: not authorized (reason 0x87)").await;
    // And a source that waits for an answer still ends when it is asked to.
    let mut session = rig.broker.accept().await;
    session.connect().await;
    rig.end().await;
    session.ended().await;
}
