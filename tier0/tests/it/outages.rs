//! The outages of `tier0 drill outages` in small, those that `consumers/tests/it/outages.rs` does not have: cuts, and
//! a consumer killed while the devices go on sending.

use std::time::Duration;

use playground::link::After;
use tier0::drill::outages::{OutageArgs, Scenario, one};

/// Short patience, so that a few seconds are an outage: a cut must be noticed, not slept through.
const IMPATIENT: [&str; 3] =
    ["database.commit_timeout=1s", "database.connect_timeout=500ms", "mqtt.keep_alive=2s"];

async fn drill(scenario: Scenario, after_cut: After) {
    let set = IMPATIENT.iter().map(|&setting| setting.to_owned()).collect();
    let args = OutageArgs { set, after_cut, ..OutageArgs::new(2_000, Duration::from_secs(5)) };
    let outcome = one(scenario, &args).await.unwrap();
    assert!(outcome.holds(), "{outcome}");
}

#[tokio::test]
async fn a_consumer_cut_off_its_broker_comes_back_to_its_session() {
    drill(Scenario::CutConsumerBroker, After::Continue).await;
}

#[tokio::test]
async fn a_consumer_whose_cut_connection_is_reset_comes_back_too() {
    drill(Scenario::CutConsumerBroker, After::Reset).await;
}

#[tokio::test]
async fn a_consumer_cut_off_the_primary_keeps_its_broker() {
    drill(Scenario::CutConsumerPrimary, After::Continue).await;
}

#[tokio::test]
async fn a_primary_cut_off_its_standby_commits_nothing_until_it_is_back() {
    drill(Scenario::CutPrimaryStandby, After::Reset).await;
}

#[tokio::test]
async fn devices_cut_off_the_broker_lose_nothing_that_was_accepted() {
    drill(Scenario::CutSimulatorBroker, After::Continue).await;
}

#[tokio::test]
async fn a_consumer_killed_again_and_again_under_load_loses_nothing() {
    drill(Scenario::ConsumerKill, After::Continue).await;
}
