//! Brokers that restart, die, freeze or refuse: the ledger stays exact, the memory bounded, the end orderly.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use playground::program::Program;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::stage::{PATIENCE, Stage};

/// Waits until the simulator's metrics are as wanted.
async fn until(
    simulator: &Program,
    what: &str,
    mut wanted: impl FnMut(&playground::metrics::Metrics) -> bool,
) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let last = simulator.metrics().await;
        if last.as_ref().is_ok_and(&mut wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {last:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn acknowledged(simulator: &Program, more: u64) {
    let before = simulator.metrics().await.unwrap().count("device_simulator_acknowledged_total");
    until(simulator, "more is acknowledged", |metrics| {
        metrics.count("device_simulator_acknowledged_total") >= before + more
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_restart_in_mid_run_loses_nothing_acknowledged() {
    let mut stage = Stage::new().await;
    let args = ["--devices", "2000", "--rate", "4000", "--set", "device_simulator.max_behind=60s"];
    let trouble = ["--trouble", "duplicate=0.05", "--trouble", "wrong_type=0.05"];
    let mut simulator = stage.simulator(&[&args[..], &trouble[..]].concat()).await;
    simulator.ready(PATIENCE).await.unwrap();
    for restarts in 1..=3 {
        acknowledged(&simulator, 2000).await;
        stage.broker.restart().await.unwrap();
        // Some go on while others are still waiting before their next try.
        until(&simulator, "all connections are back", |metrics| {
            metrics.count("device_simulator_reconnects_total") >= restarts * 16
        })
        .await;
    }
    acknowledged(&simulator, 2000).await;
    simulator.terminate(PATIENCE).await.unwrap();
    let (ledger, mut received) = (stage.ledger(), stage.received().await);
    assert!(stage.summary()["reconnects"].as_u64().unwrap() >= 3 * 16, "{}", stage.summary());
    assert!(ledger.complete && ledger.readings() > 6000);
    received.without(&ledger.unknown);
    assert_eq!(ledger.devices, received.tallies());
    // A message that was in flight when the broker ended may have arrived twice.
    let (sure, came) = (ledger.dead_letters["wrong_type"], received.dead_letters["wrong_type"]);
    assert!((sure..=sure + ledger.unknown_dead_letters).contains(&came), "{sure} {came}");
    let resent = stage.summary()["resent"].as_u64().unwrap();
    assert!((ledger.repeated..=ledger.repeated + resent).contains(&received.repeated));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_killed_for_good_leaves_what_has_no_answer_unknown() {
    let mut stage = Stage::new().await;
    let args = ["--devices", "2000", "--rate", "max", "--set", "device_simulator.grace=1s"];
    let mut simulator = stage.simulator(&args).await;
    simulator.ready(PATIENCE).await.unwrap();
    acknowledged(&simulator, 2000).await;
    stage.broker.kill9().await.unwrap();
    until(&simulator, "it sees", |metrics| metrics.count("device_simulator_connections") == 0).await;
    let open = simulator.metrics().await.unwrap().count("device_simulator_resent_total");
    assert_eq!(open, 0);
    let begun = Instant::now();
    simulator.terminate(PATIENCE).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1), "it waits for its grace period");
    let ledger = stage.ledger();
    assert!(ledger.complete && !ledger.unknown.is_empty());
    assert!(ledger.unknown.len() <= 16 * 1000, "the window bounds it: {}", ledger.unknown.len());
    let mut distinct = ledger.unknown.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), ledger.unknown.len());
    assert_eq!(stage.summary()["unknown"], ledger.unknown.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_broker_makes_the_fleet_late_and_skip_but_never_pile_up() {
    let mut stage = Stage::new().await;
    let args = ["--devices", "2000", "--rate", "2000", "--set", "device_simulator.max_behind=500ms"];
    let window = ["--set", "device_simulator.max_in_flight=10"];
    let mut simulator = stage.simulator(&[&args[..], &window[..]].concat()).await;
    simulator.ready(PATIENCE).await.unwrap();
    acknowledged(&simulator, 500).await;
    stage.broker.pause();
    until(&simulator, "it says that it skips", |metrics| {
        metrics.count("device_simulator_skipped_total") > 1000
            && metrics.sum("device_simulator_behind_seconds") > 0.4
    })
    .await;
    let frozen = simulator.metrics().await.unwrap();
    assert!(frozen.count("device_simulator_in_flight") <= 160, "the window holds");
    stage.broker.resume();
    acknowledged(&simulator, 2000).await;
    until(&simulator, "on time", |metrics| metrics.sum("device_simulator_behind_seconds") < 0.1).await;
    simulator.terminate(PATIENCE).await.unwrap();
    let (ledger, received) = (stage.ledger(), stage.received().await);
    assert!(ledger.unknown.is_empty());
    assert_eq!(ledger.devices, received.tallies());
    assert!(stage.log().contains("behind schedule"), "{}", stage.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_broker_is_given_up_and_its_late_answers_do_not_count_twice() {
    let mut stage = Stage::new().await;
    let args = ["--devices", "1000", "--rate", "2000", "--set", "device_simulator.answer_timeout=500ms"];
    let mut simulator = stage.simulator(&args).await;
    simulator.ready(PATIENCE).await.unwrap();
    acknowledged(&simulator, 500).await;
    stage.broker.pause();
    until(&simulator, "it reconnects", |metrics| metrics.count("device_simulator_reconnects_total") >= 16)
        .await;
    stage.broker.resume();
    acknowledged(&simulator, 2000).await;
    simulator.terminate(PATIENCE).await.unwrap();
    let (ledger, received) = (stage.ledger(), stage.received().await);
    assert!(stage.summary()["resent"].as_u64().unwrap() > 0);
    assert!(ledger.unknown.is_empty());
    assert_eq!(ledger.devices, received.tallies());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_subscribes_to_is_refused_and_said_aloud() {
    let stage = Stage::without_subscriber().await;
    let ledger = stage.run(&["--devices", "100", "--rate", "1000", "--count", "2500"]).await;
    assert_eq!((ledger.acknowledged, ledger.readings(), ledger.unknown.len()), (0, 0, 0));
    assert_eq!(stage.summary()["refused"]["no_matching_subscribers"], 2500);
    assert!(stage.log().contains("does not accept messages"), "{}", stage.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_simulator_leaves_a_recent_ledger_marked_incomplete() {
    let mut stage = Stage::new().await;
    let every = ["--set", "device_simulator.ledger_every=200ms"];
    let args = ["--devices", "500", "--rate", "2000"];
    let mut simulator = stage.simulator(&[&args[..], &every[..]].concat()).await;
    simulator.ready(PATIENCE).await.unwrap();
    acknowledged(&simulator, 4000).await;
    simulator.kill9().await.unwrap();
    let (ledger, received) = (stage.ledger(), stage.received().await);
    assert!(!ledger.complete);
    assert!(ledger.readings() > 0);
    let tallies = received.tallies();
    for (device, tally) in &ledger.devices {
        assert!(tallies[device].count >= tally.count, "{device}: nothing acknowledged is missing");
    }
    assert!(received.readings() >= ledger.readings());
    let left: Vec<_> = std::fs::read_dir(stage.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().filter(|name| name.to_str().unwrap().ends_with(".tmp")).count() <= 1, "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_broker_it_waits_says_why_and_starts_when_one_comes() {
    let mut stage = Stage::new().await;
    stage.broker.stop().await.unwrap();
    let mut simulator = stage.simulator(&["--devices", "100", "--rate", "1000", "--count", "1000"]).await;
    let deadline = Instant::now() + PATIENCE;
    let reason = loop {
        if let Ok((503, body)) = playground::http::get(simulator.port(), "/health/ready").await {
            let body: Value = serde_json::from_str(&body).unwrap();
            let reason = body["failing"]["mqtt"].as_str().unwrap_or_default();
            if reason.contains("refused") {
                break reason.to_owned();
            }
        }
        assert!(Instant::now() < deadline);
        sleep(Duration::from_millis(20)).await;
    };
    assert!(reason.starts_with("0 of 16 connections are up"), "{reason}");
    stage.broker.start_again().await.unwrap();
    assert!(simulator.wait(PATIENCE).await.unwrap().success());
    let (ledger, received) = (stage.ledger(), stage.received().await);
    assert_eq!((ledger.acknowledged, ledger.devices), (1000, received.tallies()));
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_waits_for_the_last_answers() {
    let mut stage = Stage::new().await;
    let mut simulator = stage.simulator(&["--devices", "1000", "--rate", "max"]).await;
    simulator.ready(PATIENCE).await.unwrap();
    acknowledged(&simulator, 1000).await;
    kill(Pid::from_raw(simulator.pid().unwrap()), Signal::SIGINT).unwrap();
    assert!(simulator.wait(PATIENCE).await.unwrap().success());
    let (ledger, received) = (stage.ledger(), stage.received().await);
    assert!(ledger.unknown.is_empty());
    assert_eq!(ledger.devices, received.tallies());
    assert_eq!(stage.summary()["sent"], ledger.acknowledged);
}
