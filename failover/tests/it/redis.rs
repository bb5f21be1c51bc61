//! Redis follows the region; and goes on by itself when only it is hit.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::fixture::{Fixture, Setup};

/// What something broken would exceed: Sentinels whose election fails try again after 10 s. The promised 5 s are for
/// `make bench-failover`.
const LIMIT: Duration = Duration::from_secs(30);

async fn redis_is_in(fixture: &Fixture, region: usize, limit: Duration) -> Duration {
    let started = Instant::now();
    let redis = fixture.redis.as_ref().unwrap();
    let port = redis.instances[region].port();
    while redis.master().await.ok() != Some(port)
        || redis.instances[region].role().await.ok().as_deref() != Some("master")
    {
        assert!(started.elapsed() < limit, "Redis of region {} is not master after {limit:?}", region + 1);
        sleep(Duration::from_millis(10)).await;
    }
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_master_follows_the_region() {
    let fixture = Setup::default().with_redis().start().await;
    for (region, index) in [("region2", 1), ("region1", 0)] {
        let report = fixture.switch(region).await;
        let step = report.steps.iter().find(|step| step.action == "redis").unwrap();
        println!(
            "{} ({:.0} ms): {}; total {:.0} ms",
            region, step.duration_ms, step.detail, report.total_duration_ms
        );
        assert_eq!(step.status, "done", "{step:?}");
        assert!(report.success);
        redis_is_in(&fixture, index, LIMIT).await;
        fixture.until("shown", |status| status.redis.region.as_deref() == Some(region)).await;
        fixture.whole().await;
        // The Sentinels refuse a second failover of the same master for twice their failover timeout, unless the
        // old master is back as a replica by then.
        let redis = fixture.redis.as_ref().unwrap();
        while redis.instances[1 - index].role().await.unwrap() != "slave" {
            sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_that_dies_takes_redis_along() {
    let mut fixture = Setup::default().with_redis().start().await;
    fixture.redis.as_mut().unwrap().instances[0].kill9().await.unwrap();
    fixture.kill_node("region1").await;
    let status = fixture
        .until("failed over", |status| status.current_region == "region2" && !status.failover_under_way)
        .await;
    let took = redis_is_in(&fixture, 1, LIMIT).await;
    println!("Redis {took:?} after the failover: {:?}", status.last_failover.unwrap().steps.last());
    fixture.redis.as_mut().unwrap().instances[0].resurrect().await.unwrap();
    fixture.revive_node("region1").await;
    fixture.whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_dies_alone_is_replaced() {
    let mut fixture = Setup::default().with_redis().start().await;
    fixture.redis.as_mut().unwrap().instances[0].kill9().await.unwrap();
    let took = redis_is_in(&fixture, 1, LIMIT).await;
    println!("Redis master replaced after {took:?}");
    assert_eq!(fixture.status().await.current_region, "region1", "Postgres was not touched");
    assert!(fixture.history().await.failovers.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_sentinels_do_not_hold_up_postgres() {
    let mut fixture = Setup::default().with_redis().start().await;
    for sentinel in &mut fixture.redis.as_mut().unwrap().sentinels {
        sentinel.kill9().await.unwrap();
    }
    let report = fixture.switch("region2").await;
    assert!(report.success, "{report:#?}");
    assert!(report.write_gap_ms.unwrap() < 10_000.0 && report.total_duration_ms < 30_000.0, "{report:#?}");
    let step = report.steps.iter().find(|step| step.action == "redis").unwrap();
    assert_eq!(step.status, "failed", "said, not hidden: {step:?}");
    fixture.until("shown", |status| status.redis.error.is_some()).await;
}
