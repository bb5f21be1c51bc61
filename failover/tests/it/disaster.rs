//! The primary is gone for good, and only the node that led before it is left.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use failover_api::{Kind, Report, Role};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::fixture::{Fixture, Setup};
use crate::load::Load;

/// region2 has taken over from region1, which is down; then region2 is lost, and region1 returns as it was.
async fn the_former_primary_is_left(fixture: &mut Fixture, load: &Load) {
    fixture.kill_node("region1").await;
    fixture
        .until("failed over", |status| status.current_region == "region2" && !status.failover_under_way)
        .await;
    load.commits_after(Instant::now(), 10).await;
    fixture.kill_node("region2").await;
    // One that remembers nothing but what it has written down.
    fixture.orchestrator.kill9().await.unwrap();
    fixture.orchestrator.restart().await.unwrap();
    fixture.restart_node("region1").await;
    fixture.until("woken", |status| status.nodes[0].role == Role::Standby).await;
    assert!(fixture.writable().await.is_empty(), "nothing is promoted by itself");
}

async fn force(fixture: &Fixture) -> Report {
    let (_, plan) = fixture.failover("region1", "?dry_run=true").await;
    assert_eq!((&plan["possible"], &plan["bytes_at_risk"]), (&json!(false), &Value::Null), "{plan:#}");
    let (found, body) = fixture.failover("region1", "").await;
    assert_eq!((found, body["error"]["code"].as_str()), (503, Some("no_safe_candidate")), "{body}");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("not known") && message.contains("allow_data_loss=true"), "{message}");
    let (found, report) = fixture.failover("region1", "?allow_data_loss=true").await;
    assert_eq!(found, 200, "{report:#}");
    serde_json::from_value(report).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_data_can_be_used_when_the_new_primarys_disk_dies() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    the_former_primary_is_left(&mut fixture, &load).await;
    fixture.empty_disk("region2");
    let report = force(&fixture).await;
    assert_eq!((report.kind, report.bytes_at_risk), (Kind::Forced, None), "{report:#?}");
    // 2 was region2's.
    assert_eq!(report.timeline_after, 3, "{report:#?}");
    // Writers, who have seen timeline 2, believe it.
    load.commits_after(Instant::now(), 10).await;
    fixture.restart_node("region2").await;
    assert_eq!(fixture.whole().await.current_region, "region1");
    fixture.leads_alone("region1").await;
    // And it is as good a pair as any.
    assert!(fixture.switch("region2").await.success);
    load.commits_after(Instant::now(), 10).await;
    fixture.whole().await;
}

/// The disk was not dead: what it has that nobody else has goes, as was accepted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_primary_that_returns_after_all_is_kept_and_then_rewound() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    the_former_primary_is_left(&mut fixture, &load).await;
    force(&fixture).await;
    load.commits_after(Instant::now(), 10).await;
    // The number that its postmaster had is another's now, as after a restart of the machine.
    let data = fixture.cluster.nodes[1].data().to_owned();
    let account = std::fs::metadata(&data).unwrap();
    let mut other = Command::new("sleep").arg("600").uid(account.uid()).gid(account.gid()).spawn().unwrap();
    let lock = data.join("postmaster.pid");
    let named = std::fs::read_to_string(&lock).unwrap();
    let (_, rest) = named.split_once('\n').unwrap();
    std::fs::write(&lock, format!("{}\n{rest}", other.id())).unwrap();
    fixture.restart_node("region2").await;
    // It may have what was lost: it is left as it is until a person has taken that out.
    fixture.discard("region2").await;
    assert_eq!(fixture.whole().await.current_region, "region1");
    fixture.leads_alone("region1").await;
    assert_eq!(other.try_wait().unwrap(), None, "whoever has the number is left alone");
    other.kill().unwrap();
    other.wait().unwrap();
    let log = std::fs::read_to_string(fixture.agents[1].log()).unwrap();
    assert!(log.contains("pg_rewind is done"), "it was rewound, not cloned: {log}");
}

/// It comes back by itself before anybody has said a word: the node that was woken to be looked at is a standby again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_woken_node_gives_way_when_the_primary_returns() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    the_former_primary_is_left(&mut fixture, &load).await;
    fixture.agent_until("region1", "estranged", |status| status.estranged).await;
    fixture.restart_node("region2").await;
    assert_eq!(fixture.whole().await.current_region, "region2");
    fixture.agent_until("region1", "a standby like others", |status| !status.estranged).await;
    load.finish().await;
}

/// The machine of the primary is there, and its Postgres starts no more: it is tried again with pauses, and what the other
/// node has can be seen meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_cannot_be_started_does_not_hide_the_former_one() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    fixture.kill_node("region1").await;
    fixture
        .until("failed over", |status| status.current_region == "region2" && !status.failover_under_way)
        .await;
    load.commits_after(Instant::now(), 10).await;
    let conf = fixture.cluster.nodes[1].data().join("postgresql.conf");
    let good = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, format!("{good}\nno_such_setting = on\n")).unwrap();
    let killed = Instant::now();
    fixture.kill_postmaster("region2");
    fixture.restart_node("region1").await;
    fixture.until("woken", |status| status.nodes[0].role == Role::Standby).await;
    assert!(fixture.writable().await.is_empty(), "nothing is promoted by itself");
    std::fs::write(&conf, good).unwrap();
    assert_eq!(fixture.whole().await.current_region, "region2");
    let outage = killed.elapsed();
    load.finish().await;
    let log = std::fs::read_to_string(fixture.orchestrator.log()).unwrap();
    let tries = log.lines().filter(|line| line.contains("upkeep failed") && line.contains("Lead")).count();
    let most = 2 + usize::try_from(outage.as_millis() / 500).unwrap();
    assert!((1..=most).contains(&tries), "{tries} tries in {outage:?}, at least half a second apart");
}

/// A standby whose configuration somebody broke cannot be detached for certain: the primary that is gone might come back and
/// find it following. It is not promoted until it has read that it follows nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_reads_no_configuration_is_no_fence() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    load.commits_after(Instant::now(), 10).await;
    let conf = fixture.cluster.nodes[1].data().join("postgresql.conf");
    let good = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, format!("{good}\nno_such_setting = on\n")).unwrap();
    fixture.kill_node("region1").await;
    fixture
        .until("refused", |status| {
            status.last_failover.as_ref().is_some_and(|last| !last.success) && !status.failover_under_way
        })
        .await;
    assert!(fixture.writable().await.is_empty(), "nobody leads");
    std::fs::write(&conf, good).unwrap();
    fixture
        .until("failed over", |status| status.current_region == "region2" && !status.failover_under_way)
        .await;
    load.commits_after(Instant::now(), 10).await;
    fixture.restart_node("region1").await;
    assert_eq!(fixture.whole().await.current_region, "region2");
    load.finish().await;
}
