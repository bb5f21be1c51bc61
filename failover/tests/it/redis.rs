//! Redis follows the region, whatever the Sentinels say; and goes on by itself when only it is hit.

use std::time::Duration;

use failover_api::{Report, Status, StepRecord, StepStatus};
use playground::redis::MASTER;
use reqwest::Method;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::fixture::{Fixture, LIMIT, Setup, TOKEN, answered};

/// A Sentinel that was stopped for 2 s or more carries out nothing for its first 30 s (TILT).
const TILT: Duration = Duration::from_secs(180);

fn step(report: &Report) -> &StepRecord {
    report.steps.iter().find(|step| step.action == "redis").unwrap()
}

fn alarms(status: &Status) -> Vec<&str> {
    status.alarms.iter().map(String::as_str).filter(|alarm| alarm.starts_with("Redis")).collect()
}

async fn alarm(fixture: &Fixture, part: &str) {
    let status = fixture
        .until(&format!("an alarm with {part:?}"), |status| {
            alarms(status).iter().any(|alarm| alarm.contains(part))
        })
        .await;
    println!("{:?}", alarms(&status));
}

async fn quiet(fixture: &Fixture, region: &str) {
    fixture
        .until("without an alarm of Redis", |status| {
            status.redis.region.as_deref() == Some(region) && alarms(status).is_empty()
        })
        .await;
}

async fn role(fixture: &Fixture, region: usize) -> String {
    // When its role changes, Sentinel ends everybody's connections.
    answered("its role", async || fixture.redis.as_ref().unwrap().instances[region].role().await).await
}

async fn until_role(fixture: &Fixture, region: usize, wanted: &str) {
    let started = Instant::now();
    while role(fixture, region).await != wanted {
        assert!(started.elapsed() < LIMIT, "Redis of region {} is no {wanted} after {LIMIT:?}", region + 1);
        sleep(Duration::from_millis(20)).await;
    }
}

fn pause_sentinels(fixture: &mut Fixture, first: usize) {
    fixture.redis.as_mut().unwrap().sentinels.iter_mut().skip(first).for_each(|sentinel| sentinel.pause());
}

fn resume_sentinels(fixture: &mut Fixture) {
    fixture.redis.as_mut().unwrap().sentinels.iter_mut().for_each(|sentinel| sentinel.resume());
}

/// From now on the first configured Sentinel names the Redis on `port`.
async fn first_sentinel_names(fixture: &Fixture, port: u16) {
    let liar = &fixture.redis.as_ref().unwrap().sentinels[0];
    for command in
        [format!("SENTINEL REMOVE {MASTER}"), format!("SENTINEL MONITOR {MASTER} 127.0.0.1 {port} 2")]
    {
        let answer = liar.command(&command).await.unwrap();
        assert_eq!(answer.trim(), "+OK", "{command}");
    }
}

async fn set_mode(fixture: &Fixture, mode: &str) {
    let (status, body) = fixture.call(Method::POST, "/mode", Some(TOKEN), Some(json!({"mode": mode}))).await;
    assert_eq!(status, 200, "{body:#}");
}

async fn redis_is_in(fixture: &Fixture, region: usize, limit: Duration) -> Duration {
    let started = Instant::now();
    let redis = fixture.redis.as_ref().unwrap();
    let port = redis.instances[region].port();
    while redis.agreeing(port).await < 2
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
        let step = step(&report);
        println!(
            "{} ({:.0} ms): {}; total {:.0} ms",
            region, step.duration_ms, step.detail, report.total_duration_ms
        );
        assert_eq!(step.status, StepStatus::Done, "{step:?}");
        assert!(report.success);
        redis_is_in(&fixture, index, LIMIT).await;
        fixture.until("shown", |status| status.redis.region.as_deref() == Some(region)).await;
        fixture.whole().await;
        // The Sentinels refuse a second failover of the same master for twice their failover timeout, unless the
        // old master is back as a replica by then.
        until_role(&fixture, 1 - index, "slave").await;
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
    fixture.redis.as_mut().unwrap().instances[0].start_again().await.unwrap();
    fixture.restart_node("region1").await;
    fixture.whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_dies_alone_is_replaced_and_led_back() {
    let mut fixture = Setup::default().with_redis().start().await;
    fixture.redis.as_mut().unwrap().instances[0].kill9().await.unwrap();
    let took = redis_is_in(&fixture, 1, LIMIT).await;
    println!("Redis master replaced after {took:?}");
    alarm(&fixture, "does not answer").await;
    fixture.redis.as_mut().unwrap().instances[0].start_again().await.unwrap();
    let took = redis_is_in(&fixture, 0, LIMIT).await;
    println!("Redis master back in the region of the primary after {took:?}");
    quiet(&fixture, "region1").await;
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
    let step = step(&report);
    assert_eq!(step.status, StepStatus::Failed, "said, not hidden: {step:?}");
    fixture.until("shown", |status| status.redis.error.is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_that_slept_are_asked_again() {
    let mut fixture = Setup::default().with_redis().start().await;
    pause_sentinels(&mut fixture, 0);
    let report = fixture.switch("region2").await;
    assert_eq!(step(&report).status, StepStatus::Failed, "{:?}", step(&report));
    alarm(&fixture, "0 of 3 Sentinels").await;
    assert_eq!(role(&fixture, 1).await, "slave", "nobody moved it");
    resume_sentinels(&mut fixture);
    let took = redis_is_in(&fixture, 1, TILT).await;
    println!("Redis moved {took:?} after the Sentinels woke");
    quiet(&fixture, "region2").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_sentinel_is_no_majority() {
    let mut fixture = Setup::default().with_redis().start().await;
    pause_sentinels(&mut fixture, 1);
    let report = fixture.switch("region2").await;
    let step = step(&report);
    println!("{:.0} ms: {}", step.duration_ms, step.detail);
    assert_eq!(step.status, StepStatus::Failed, "two of three have not said so: {step:?}");
    assert!(step.duration_ms < 6_000.0, "those that sleep are not waited for one by one: {step:?}");
    assert_eq!(role(&fixture, 1).await, "master");
    alarm(&fixture, "1 of 3 Sentinels").await;
    resume_sentinels(&mut fixture);
    redis_is_in(&fixture, 1, TILT).await;
    quiet(&fixture, "region2").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sentinel_that_lies_is_not_believed() {
    let fixture = Setup::default().with_redis().start().await;
    let redis = fixture.redis.as_ref().unwrap();
    // Already where it should go, it says; the two others and the instance itself say otherwise.
    first_sentinel_names(&fixture, redis.instances[1].port()).await;
    let report = fixture.switch("region2").await;
    let step = step(&report);
    println!("{:.0} ms: {}", step.duration_ms, step.detail);
    assert_eq!(step.status, StepStatus::Done, "{step:?}");
    assert_eq!(role(&fixture, 1).await, "master", "done is done: {step:?}");
    redis_is_in(&fixture, 1, LIMIT).await;
    // The orchestrator looks once a second.
    quiet(&fixture, "region2").await;
    // Somewhere else, it says: where nothing listens.
    first_sentinel_names(&fixture, playground::port::Port::free().unwrap().number()).await;
    let lied = Instant::now();
    while lied.elapsed() < Duration::from_secs(3) {
        let status = fixture.status().await;
        // A Sentinel that is late for once may make it unknown.
        assert!(
            status.redis.region.as_deref().is_none_or(|region| region == "region2"),
            "{:?}",
            status.redis
        );
        sleep(Duration::from_millis(50)).await;
    }
    quiet(&fixture, "region2").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_paused_redis_is_left_where_it_is() {
    let fixture = Setup::default().with_redis().start().await;
    set_mode(&fixture, "paused").await;
    let answer =
        fixture.redis.as_ref().unwrap().sentinels[2].command(&format!("SENTINEL FAILOVER {MASTER}")).await;
    assert_eq!(answer.unwrap().trim(), "+OK");
    redis_is_in(&fixture, 1, LIMIT).await;
    alarm(&fixture, "paused").await;
    assert_eq!(role(&fixture, 1).await, "master", "only told");
    set_mode(&fixture, "auto").await;
    redis_is_in(&fixture, 0, LIMIT).await;
    quiet(&fixture, "region1").await;
}
