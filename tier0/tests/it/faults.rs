//! Random faults on the whole of it, for a short while; `make drill` plays the same for minutes.

use std::process::ExitCode;
use std::time::Duration;

use tier0::drill::failover::{FaultArgs, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_faults_lose_nothing_and_the_cluster_heals() {
    let seed = std::env::var("TIER0_SEED").ok().map(|seed| seed.parse().unwrap());
    let args = FaultArgs { duration: Duration::from_secs(40), rounds: 5, seed, rate: 1_000 };
    assert_eq!(run(args).await.unwrap(), ExitCode::SUCCESS);
}
