//! How many copies a commit has right after a failover: two at once with a third node, or when it is demanded.

use std::time::Duration;

use failover_api::Role;
use tokio::time::{Instant, sleep};

use crate::fixture::Setup;
use crate::load::Load;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_three_nodes_there_are_two_copies_soon() {
    let mut fixture = Setup::default().three_nodes().start().await;
    let load = Load::start(&fixture.database()).await;
    let mut copies = Vec::new();
    for _ in 0..2 {
        let from = fixture.whole().await.current_region;
        let started = Instant::now();
        fixture.kill_node(&from).await;
        let status = fixture
            .until("failed over", |status| status.current_region != from && !status.failover_under_way)
            .await;
        let last = status.last_failover.unwrap();
        assert!(last.success, "{last:#?}");
        copies.push(last.copies_after);
        load.commits_after(Instant::now(), 10).await;
        println!("{from} -> {}: {:?}, {:?}", last.target_region, load.gap_since(started), last.steps);
        // A third node that needs longer than the others is left out at first, and soon taken in.
        fixture.until("two copies", |status| !status.wait_for.is_empty()).await;
        fixture.restart_node(&from).await;
    }
    let to =
        fixture.whole().await.nodes.iter().find(|node| node.role == Role::Standby).unwrap().region.clone();
    let report = fixture.switch(&to).await;
    copies.push(report.copies_after);
    assert!(copies.contains(&2), "{copies:?}");
    load.commits_after(Instant::now(), 10).await;
    assert_eq!(fixture.whole().await.current_region, to);
    load.finish().await;
}

/// The primary dies and a third node hangs, both at once. The second one is enough to fence, and enough to go on with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_node_that_hangs_holds_nobody_up() {
    let mut fixture = Setup::default().three_nodes().start().await;
    let load = Load::start(&fixture.database()).await;
    let started = Instant::now();
    fixture.agents[2].pause();
    fixture.kill_postmaster("region1");
    let status = fixture
        .until("failed over", |status| status.current_region == "region2" && !status.failover_under_way)
        .await;
    let last = status.last_failover.unwrap();
    assert!(last.success, "{last:#?}");
    load.commits_after(Instant::now(), 10).await;
    println!("{:?}, {:?}", load.gap_since(started), last.steps);
    assert!(load.gap_since(started) < Duration::from_secs(20), "{:?}", load.gap_since(started));
    fixture.agents[2].resume();
    fixture.whole().await;
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_copies_means_that_nothing_is_acknowledged_with_one() {
    let mut fixture = Setup::default().set("orchestrator.copies", "two_copies").start().await;
    let load = Load::start(&fixture.database()).await;
    let killed = Instant::now();
    fixture.kill_node("region1").await;
    fixture.until("decided", |status| status.current_region == "region2").await;
    let decided = Instant::now();
    // Longer than it takes to promote, and than the standby is missed for.
    sleep(Duration::from_secs(5)).await;
    fixture.leads_alone("region2").await;
    assert!(load.is_silent_since(decided), "acknowledged with one copy");
    fixture.restart_node("region1").await;
    load.commits_after(killed, 10).await;
    fixture.whole().await;
    fixture.until("waited for", |status| status.wait_for == ["region1".to_owned()].into()).await;
    load.finish().await;
}
