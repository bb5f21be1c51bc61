//! The ledger says what an independent subscriber got, device by device.

use crate::stage::Stage;
use wire::ledger::Ledger;

/// Count, first and last timestamp, checksum of every device; dead letters by reason; messages; repeats.
fn assert_same(ledger: &Ledger, received: &crate::stage::Received) {
    assert!(ledger.complete);
    assert!(ledger.unknown.is_empty() && ledger.unknown_dead_letters == 0);
    assert_eq!(ledger.acknowledged, received.messages);
    assert_eq!(ledger.repeated, received.repeated);
    assert_eq!(ledger.dead_letters, received.dead_letters);
    assert_eq!(ledger.devices, received.tallies());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_reading_reached_the_subscriber() {
    let mut stage = Stage::new().await;
    let ledger = stage.run(&["--devices", "2000", "--rate", "max", "--count", "20000"]).await;
    let received = stage.received().await;
    assert_same(&ledger, &received);
    assert_eq!((ledger.readings(), ledger.acknowledged, ledger.qos), (20_000, 20_000, 1));
    assert_eq!(ledger.devices.len(), 2000);
    assert!(ledger.devices.values().all(|tally| tally.count == 10), "all take their turn");
    let mean = received.sizes.iter().sum::<usize>() / received.sizes.len();
    assert!((380..=440).contains(&mean), "about 400 bytes: {mean}");
    let summary = stage.summary();
    assert_eq!((&summary["acknowledged"], &summary["readings"]), (&20_000.into(), &20_000.into()));
    assert!(stage.log().contains("20000 messages acknowledged in"), "{}", stage.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn at_qos_0_what_was_sent_counts() {
    let mut stage = Stage::new().await;
    let args = ["--devices", "500", "--qos", "0", "--rate", "2000", "--count", "4000"];
    let ledger = stage.run(&args).await;
    let received = stage.received().await;
    assert_eq!(ledger.qos, 0);
    assert_same(&ledger, &received);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_trouble_becomes_what_the_ledger_says() {
    let mut stage = Stage::new().await;
    let mut args = vec!["--devices", "1000", "--rate", "4000", "--count", "12000"];
    for trouble in [
        "not_json=0.02",
        "wrong_type=0.02",
        "missing_field=0.02",
        "topic_mismatch=0.02",
        "nul_character=0.02",
        "too_old=0.02",
        "far_future=0.02",
        "late=0.05",
        "duplicate=0.05",
        "too_large=0.001",
        "duplicate_after=200ms",
        "oversize=300KiB",
    ] {
        args.extend(["--trouble", trouble]);
    }
    let ledger = stage.run(&args).await;
    let received = stage.received().await;
    assert_same(&ledger, &received);
    assert_eq!(ledger.dead_letters.len(), 7, "{:?}", ledger.dead_letters);
    assert!(ledger.dead_letters.values().all(|count| *count > 0));
    assert!(ledger.dead_letters["timestamp_out_of_range"] > 400, "both old and future ones");
    assert!((300..700).contains(&ledger.repeated), "{}", ledger.repeated);
    let late = received.good.values().flatten().filter(|at| **at < ledger.started_us - 300_000_000).count();
    assert!((400..800).contains(&late), "{late} late ones are good readings");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateways_array_is_many_readings_of_one_device() {
    let mut stage = Stage::new().await;
    let args = ["--devices", "20", "--array", "50", "--rate", "200", "--count", "400"];
    let trouble = ["--trouble", "wrong_type=0.1", "--trouble", "duplicate=0.1", "--trouble", "not_json=0.05"];
    let ledger = stage.run(&[&args[..], &trouble[..]].concat()).await;
    let received = stage.received().await;
    assert_same(&ledger, &received);
    let (poisoned, lost) = (ledger.dead_letters["wrong_type"], ledger.dead_letters["not_json"]);
    assert_eq!(
        ledger.readings() + ledger.repeated,
        (400 - lost) * 50 - poisoned,
        "one bad costs no good one"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_gives_the_same_trouble_in_another_run() {
    let mut letters = Vec::new();
    for seed in ["7", "7", "8"] {
        let stage = Stage::new().await;
        let args = ["--devices", "200", "--rate", "max", "--count", "4000", "--seed", seed];
        let ledger = stage.run(&[&args[..], &["--trouble", "wrong_type=0.1"]].concat()).await;
        assert_eq!(ledger.seed.to_string(), seed);
        letters.push(ledger.dead_letters);
    }
    assert_eq!(letters[0], letters[1]);
    assert_ne!(letters[0], letters[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_per_device() {
    let mut stage = Stage::new().await;
    let devices = ["--devices", "1500", "--connections", "1500", "--interval", "2s", "--count", "3000"];
    let ledger = stage.run(&devices).await;
    let received = stage.received().await;
    assert_same(&ledger, &received);
    assert!(ledger.devices.values().all(|tally| tally.count == 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_publish_evenly_over_their_interval() {
    let mut stage = Stage::new().await;
    let ledger = stage.run(&["--devices", "1000", "--interval", "1s", "--for", "4s"]).await;
    let received = stage.received().await;
    assert_same(&ledger, &received);
    assert!((3900..=4100).contains(&ledger.readings()), "{}", ledger.readings());
    let mut times: Vec<i64> = received.good.values().flatten().copied().collect();
    times.sort_unstable();
    let start = times[0];
    let mut slots = vec![0_u32; 20];
    for at in &times {
        if let Some(slot) = slots.get_mut(usize::try_from((at - start) / 200_000).unwrap()) {
            *slot += 1;
        }
    }
    // 200 in each fifth of a second; half of that or twice that would be bursts, at least two in each second. A pause of the
    // machine makes two.
    let bursts = slots[1..19].iter().filter(|count| !(100..=400).contains(*count)).count();
    assert!(bursts <= 5, "{slots:?}");
}
