//! A publisher between a made-up broker and a made-up clock.

use std::collections::BTreeSet;

use bytes::BytesMut;
use rumqttc::v5::mqttbytes::v5::{Packet, Publish};
use service::metrics::Registry;

use super::*;
use crate::device::settings::Rate;
use crate::device::trouble::TroubleSettings;
use crate::seeds::{join, unit};

const WALL: i64 = 1_770_091_506_000_000;
const LIMITS: Limits = Limits { receive_maximum: 20, packet_size: 4096, qos: 2, keep_alive: None };

fn publisher(change: impl FnOnce(&mut FleetSettings)) -> (Publisher, Metrics) {
    let mut settings =
        FleetSettings { devices: 50, connections: 1, rate: Some(Rate::Max), ..FleetSettings::default() };
    change(&mut settings);
    let metrics = Metrics::new(&Registry::new()).unwrap();
    (Publisher::new(Arc::new(settings), 0, metrics.clone()), metrics)
}

fn at(ms: u64) -> Now {
    let since = Duration::from_millis(ms);
    Now { since, wall_us: WALL + i64::try_from(since.as_micros()).unwrap() }
}

/// Takes all that is to be written, as the broker reads it.
fn written(publisher: &mut Publisher, now: Now) -> Vec<Publish> {
    let mut bytes = BytesMut::from(publisher.to_write());
    publisher.wrote(bytes.len(), now.since);
    let mut all = Vec::new();
    while !bytes.is_empty() {
        match Packet::read(&mut bytes, None).unwrap() {
            Packet::Publish(publish) => all.push(publish),
            Packet::PingReq(_) => {}
            other => panic!("{other:?}"),
        }
    }
    all
}

fn ack(id: u16, reason: u8) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    if reason == 0 { vec![0x40, 2, high, low] } else { vec![0x40, 3, high, low, reason] }
}

fn readings(publisher: &Publisher) -> u64 {
    publisher.snapshot().tallies.iter().map(|tally| tally.count).sum()
}

#[test]
fn the_brokers_window_is_kept_and_refilled_by_its_answers() {
    let (mut publisher, metrics) = publisher(|_| {});
    publisher.connected(LIMITS, Duration::ZERO);
    assert_eq!(publisher.fill(at(0)), 20);
    let open = written(&mut publisher, at(0));
    assert_eq!(open.iter().map(|publish| publish.pkid).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
    assert_eq!(publisher.fill(at(1)), 0);
    let answers = [ack(2, 0), ack(1, 0), ack(3, 0)].concat();
    publisher.read(&answers[..7], at(2).since).unwrap();
    publisher.read(&answers[7..], at(3).since).unwrap();
    assert_eq!(readings(&publisher), 3);
    assert_eq!(publisher.fill(at(3)), 3);
    assert_eq!((metrics.in_flight.get(), metrics.acknowledged.get()), (20, 3));
    assert_eq!(metrics.puback_seconds.get_sample_count(), 3);
}

#[test]
fn an_answer_to_nothing_ends_the_connection() {
    let (mut publisher, _) = publisher(|_| {});
    publisher.connected(LIMITS, Duration::ZERO);
    publisher.fill(at(0));
    written(&mut publisher, at(0));
    publisher.read(&ack(1, 0), at(1).since).unwrap();
    for id in [1, 21, 0] {
        assert!(matches!(publisher.read(&ack(id, 0), at(1).since), Err(ProtocolError::Unexpected(_))));
    }
    assert_eq!(readings(&publisher), 1);
}

#[test]
fn what_was_lost_is_sent_again_byte_for_byte_before_anything_new() {
    let (mut publisher, metrics) = publisher(|_| {});
    publisher.connected(LIMITS, Duration::ZERO);
    publisher.fill(at(0));
    let first = written(&mut publisher, at(0));
    publisher.read(&ack(5, 0), at(1).since).unwrap();
    publisher.lost();
    assert_eq!(metrics.in_flight.get(), 0);
    assert!(!publisher.is_settled());
    assert_eq!(publisher.snapshot().unknown.len(), 19);
    publisher.stop();
    publisher.connected(Limits { receive_maximum: 12, ..LIMITS }, at(500).since);
    assert_eq!(publisher.fill(at(500)), 12);
    let mut second = written(&mut publisher, at(500));
    (1..=12).for_each(|id| publisher.read(&ack(id, 0), at(501).since).unwrap());
    assert_eq!(publisher.fill(at(501)), 7);
    second.extend(written(&mut publisher, at(501)));
    let expected = first.iter().filter(|publish| publish.pkid != 5);
    assert!(expected.map(|p| (&p.topic, &p.payload)).eq(second.iter().map(|p| (&p.topic, &p.payload))));
    assert!(second.iter().all(|publish| !publish.dup), "a new session knows no duplicates");
    (13..=19).for_each(|id| publisher.read(&ack(id, 0), at(502).since).unwrap());
    assert!(publisher.is_settled());
    assert_eq!((readings(&publisher), publisher.snapshot().unknown.len()), (20, 0));
    assert_eq!(publisher.traffic().resent, 19);
}

#[test]
fn at_qos_0_a_message_counts_when_its_last_byte_is_written() {
    let (mut publisher, metrics) = publisher(|settings| settings.qos = 0);
    publisher.connected(LIMITS, Duration::ZERO);
    let made = publisher.fill(at(0));
    assert!(made > 20, "the window is for QoS 1: {made}");
    publisher.wrote(10, Duration::ZERO);
    assert_eq!(readings(&publisher), 0);
    publisher.fill(at(1));
    publisher.wrote(1000, Duration::ZERO);
    assert_eq!(readings(&publisher), 2, "messages of about 460 bytes");
    publisher.stop();
    publisher.fill(at(2));
    let rest = publisher.to_write().len();
    publisher.wrote(rest, Duration::ZERO);
    assert!(publisher.is_settled());
    assert_eq!(
        (readings(&publisher), metrics.acknowledged.get(), metrics.in_flight.get()),
        (publisher.traffic().sent, publisher.traffic().sent, 0)
    );
}

#[test]
fn a_message_the_broker_cannot_take_is_refused_here() {
    let trouble = TroubleSettings { too_large: 1.0, ..TroubleSettings::default() };
    let (mut publisher, _) = publisher(|settings| {
        settings.trouble = trouble;
        settings.count = Some(3);
    });
    publisher.connected(LIMITS, Duration::ZERO);
    assert_eq!(publisher.fill(at(0)), 0);
    assert!(publisher.is_finished() && publisher.is_settled());
    assert_eq!(publisher.traffic().refused, [("larger_than_the_broker_takes", 3)].into());
    assert_eq!(publisher.snapshot().totals.acknowledged, 0);
}

#[test]
fn a_silent_broker_is_pinged_and_then_given_up() {
    let (mut publisher, _) = publisher(|settings| {
        settings.answer_timeout = Duration::from_secs(10);
        settings.count = Some(1);
    });
    let keep_alive = Duration::from_secs(30);
    publisher.connected(LIMITS, Duration::ZERO);
    publisher.fill(at(0));
    written(&mut publisher, at(0));
    publisher.read(&ack(1, 0), at(1).since).unwrap();
    publisher.check_silence(keep_alive, at(14_000).since).unwrap();
    assert!(publisher.to_write().is_empty());
    publisher.check_silence(keep_alive, at(16_000).since).unwrap();
    assert_eq!(publisher.to_write(), protocol::PINGREQ);
    publisher.wrote(2, at(16_000).since);
    publisher.read(&[0xd0, 0], at(17_000).since).unwrap();
    publisher.check_silence(keep_alive, at(33_000).since).unwrap();
    assert_eq!(publisher.to_write(), protocol::PINGREQ);
    publisher.check_silence(keep_alive, at(42_000).since).unwrap();
    assert!(publisher.check_silence(keep_alive, at(43_100).since).unwrap_err().contains("not answered"));
    publisher.lost();
    // A broker that asks for a shorter keep-alive gets it.
    publisher.connected(Limits { keep_alive: Some(Duration::from_secs(2)), ..LIMITS }, at(50_000).since);
    publisher.check_silence(keep_alive, at(51_100).since).unwrap();
    assert_eq!(publisher.to_write(), protocol::PINGREQ);
}

/// Whatever the broker does, every good reading made is in exactly one place: tallied, refused, or unknown. And
/// nothing is tallied that the broker did not say yes to.
#[test]
fn readings_are_conserved_through_any_course_of_answers_and_losses() {
    for seed in 0..60 {
        let trouble =
            TroubleSettings { duplicate: 0.1, late: 0.1, wrong_type: 0.1, ..TroubleSettings::default() };
        let (mut publisher, metrics) = publisher(|settings| {
            settings.seed = seed;
            settings.count = Some(500);
            settings.array = if seed % 2 == 0 { 1 } else { 3 };
            settings.trouble = TroubleSettings { duplicate_after: Duration::from_millis(5), ..trouble };
        });
        let (mut taken, mut tried) = (BTreeSet::new(), BTreeSet::new());
        let mut draws = (0..).map(|step| join(seed, step));
        let mut open: Vec<Publish> = Vec::new();
        publisher.connected(LIMITS, Duration::ZERO);
        for ms in 0..2000 {
            publisher.fill(at(ms));
            open.extend(written(&mut publisher, at(ms)));
            tried.extend(open.iter().map(|publish| publish.payload.clone()));
            while !open.is_empty() && draws.next().is_some_and(|bits| unit(bits) < 0.9) {
                let bits = draws.next().unwrap();
                let publish = open.swap_remove((bits % open.len() as u64) as usize);
                let reason = if unit(bits) < 0.1 { 0x97 } else { 0 };
                if reason == 0 {
                    taken.insert(publish.payload);
                }
                publisher.read(&ack(publish.pkid, reason), at(ms).since).unwrap();
            }
            if unit(draws.next().unwrap()) < 0.02 {
                open.clear();
                publisher.lost();
                publisher.connected(LIMITS, at(ms).since);
            }
        }
        let books = publisher.snapshot();
        let sets = |payloads: &BTreeSet<bytes::Bytes>| payloads.iter().map(good).sum::<u64>();
        assert_eq!(readings(&publisher), sets(&taken), "seed {seed}: tallied is what was taken");
        assert!(publisher.is_finished());
        let unknown: BTreeSet<_> = books.unknown.iter().collect();
        assert_eq!(unknown.len(), books.unknown.len(), "seed {seed}: each unknown once");
        assert!(sets(&taken) + unknown.len() as u64 <= sets(&tried), "seed {seed}");
        assert_eq!(metrics.in_flight.get(), open.len() as i64);
        assert_eq!(books.totals.acknowledged, metrics.acknowledged.get());
    }
}

/// Good readings in a payload, by a look at it: one with a wrong type is not.
fn good(payload: &bytes::Bytes) -> u64 {
    let value: serde_json::Value = serde_json::from_slice(payload).unwrap();
    let readings = value.as_array().cloned().unwrap_or_else(|| vec![value]);
    let good = readings.iter().filter(|reading| {
        reading["device_type"].is_string()
            && reading["timestamp_utc"].is_string()
            && reading["metrics"].is_object()
    });
    good.count() as u64
}
