//! The primary dies, in every way we know of; nobody helps.

use std::time::Duration;

use failover_api::{Kind, Status};
use nix::sys::signal::{Signal, kill};
use tokio::time::Instant;

use crate::fixture::{Fixture, LIMIT, Setup};
use crate::load::{Load, judge};

/// Tests share the machine with whatever else runs: a bound that something broken would exceed. The figures are for
/// `make bench-failover`, on a quiet machine.
const MOST: Duration = Duration::from_secs(4);

fn other(region: &str) -> &'static str {
    if region == "region1" { "region2" } else { "region1" }
}

/// Waits for the failover away from `from`, then for the writers, and says how long they waited.
async fn gap(fixture: &Fixture, load: &Load, from: &str, started: Instant) -> (Duration, Status) {
    let status = fixture
        .until("failed over", |status| status.current_region != from && !status.failover_under_way)
        .await;
    load.commits_after(Instant::now(), 10).await;
    let gap = load.gap_since(started);
    let last = status.last_failover.clone().unwrap();
    println!(
        "{from} -> {}: write gap {gap:?}, by the orchestrator {:?} ms, total {:.0} ms; {}; {:?}",
        status.current_region,
        last.write_gap_ms,
        last.total_duration_ms,
        last.reason,
        last.steps.iter().map(|step| format!("{} {:.0}", step.action, step.duration_ms)).collect::<Vec<_>>()
    );
    assert!(last.success, "{last:#?}");
    assert_eq!(last.kind, Kind::Unplanned);
    assert_eq!(last.target_region, other(from));
    (gap, status)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_postmaster_is_replaced_and_comes_back_as_standby() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let mut gaps = Vec::new();
    for _ in 0..4 {
        let from = fixture.whole().await.current_region;
        load.commits_after(Instant::now(), 10).await;
        let started = Instant::now();
        fixture.kill_postmaster(&from);
        let (waited, status) = gap(&fixture, &load, &from, started).await;
        gaps.push(waited);
        // Known later than that it ended, and all the same in the record.
        let reason = status.last_failover.unwrap().reason;
        assert!(reason.contains("SIGKILL"), "{reason}");
        let rejoin = Instant::now();
        fixture.whole().await;
        println!("whole again after {:?}", rejoin.elapsed());
        fixture.leads_alone(other(&from)).await;
    }
    load.finish().await;
    judge(gaps, MOST);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_is_replaced_and_comes_back_as_standby() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let mut gaps = Vec::new();
    for _ in 0..3 {
        let from = fixture.whole().await.current_region;
        load.commits_after(Instant::now(), 10).await;
        let started = Instant::now();
        fixture.kill_node(&from).await;
        gaps.push(gap(&fixture, &load, &from, started).await.0);
        fixture.restart_node(&from).await;
        let rejoin = Instant::now();
        fixture.whole().await;
        println!("whole again after {:?}", rejoin.elapsed());
    }
    load.finish().await;
    judge(gaps, MOST);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_is_replaced_and_cannot_acknowledge_when_it_thaws() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let mut gaps = Vec::new();
    for _ in 0..3 {
        let from = fixture.whole().await.current_region;
        load.commits_after(Instant::now(), 10).await;
        let started = Instant::now();
        let index = fixture.index(&from);
        fixture.agents[index].pause();
        gaps.push(gap(&fixture, &load, &from, started).await.0);
        fixture.agents[index].resume();
        let rejoin = Instant::now();
        fixture.whole().await;
        println!("whole again after {:?}", rejoin.elapsed());
        fixture.leads_alone(other(&from)).await;
    }
    load.finish().await;
    judge(gaps, MOST * 2);
}

/// The postmaster alone frozen: open sessions go on, a standby streams, so the primary lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_a_standby_hears_is_not_replaced() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let postmaster = fixture.postmaster("region1");
    kill(postmaster, Signal::SIGSTOP).unwrap();
    let started = Instant::now();
    // Longer than every limit of the policy.
    while started.elapsed() < Duration::from_secs(3) {
        load.commits_after(Instant::now(), 5).await;
        assert_eq!(fixture.status().await.current_region, "region1");
    }
    kill(postmaster, Signal::SIGCONT).unwrap();
    assert!(fixture.history().await.failovers.is_empty());
    load.finish().await;
}

/// The WAL that a node needs may be gone on the primary. It would ask for it for ever: it is cloned, through a new slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_wal_is_gone_is_cloned() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    // Without the reserve that is shipped.
    for region in ["region1", "region2"] {
        let db = fixture.admin(region).await;
        db.batch_execute("ALTER SYSTEM SET wal_keep_size = 0").await.unwrap();
        db.batch_execute("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'").await.unwrap();
        db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    }
    fixture.kill_node("region2").await;
    fixture.until("degraded", |status| status.wait_for.is_empty()).await;
    let db = fixture.admin("region1").await;
    let sql = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'region2'";
    let began = Instant::now();
    // It goes with a checkpoint, but not with one that had begun before there was enough of it.
    while db.query_one(sql, &[]).await.unwrap().get::<_, String>(0) != "lost" {
        assert!(began.elapsed() < LIMIT, "the WAL stays");
        db.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        load.commits_after(Instant::now(), 10).await;
        db.batch_execute("CHECKPOINT").await.unwrap();
    }
    drop(db);
    fixture.restart_node("region2").await;
    let status = fixture.whole().await;
    assert_eq!(status.current_region, "region1");
    load.finish().await;
}
