//! What an operator's hand, old state and a second orchestrator do to a running cluster, on real processes.

use std::process::Stdio;
use std::time::Duration;

use failover::protocol::Postmaster;
use failover_api::{Role, Status};
use reqwest::Method;
use serde_json::json;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::fixture::{Fixture, LIMIT, Setup, TOKEN, answered};
use crate::load::Load;

fn says(status: &Status, what: &str) -> bool {
    status.alarms.iter().any(|alarm| alarm.contains(what))
}

async fn promote_by_hand(fixture: &Fixture, region: &str) {
    let db = fixture.admin(region).await;
    // It may be stopped again before it has answered, and before it could be asked.
    let asked = db.batch_execute("SELECT pg_promote(false)").await;
    fixture.agent_until(region, &format!("promoted ({asked:?})"), |status| status.timeline() >= 2).await;
}

/// Long enough for everything that would be done by itself.
const QUIET: Duration = Duration::from_secs(6);

/// `pg_promote` on the standby of a healthy pair. It has acknowledged nothing, and writers go by the timeline: the primary
/// leads again above it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_promoted_by_hand_does_not_stop_the_writers() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    promote_by_hand(&fixture, "region2").await;
    let promoted = Instant::now();
    load.commits_after(promoted, 10).await;
    println!("writes went on {:?} after the promotion", promoted.elapsed());
    let status = fixture.whole().await;
    assert_eq!(status.current_region, "region1");
    fixture.leads_alone("region1").await;
    assert!(fixture.agent("region1").await.timeline() > 2, "above the stray");
    load.finish().await;
}

/// The orchestrator is away; somebody promotes the standby and has it acknowledge alone. Afterwards there are two
/// truths, and only a person can say which one holds; the other is kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_was_written_to_is_for_a_person_to_judge() {
    let mut fixture = Setup::default().start().await;
    fixture.orchestrator.kill9().await.unwrap();
    fixture.kill_node("region1").await;
    promote_by_hand(&fixture, "region2").await;
    let db = fixture.admin("region2").await;
    db.batch_execute("ALTER SYSTEM RESET ALL").await.unwrap();
    db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    db.batch_execute("CREATE TABLE written_by_hand (a int)").await.unwrap();
    fixture.restart_node("region1").await;
    fixture.orchestrator.restart().await.unwrap();
    let status = fixture.until("in doubt", |status| says(status, "POST /adopt/")).await;
    assert!(status.doubts.iter().any(|doubt| doubt.contains("region2 is on timeline 2")), "{status:#?}");
    sleep(QUIET).await;
    // Nothing was done.
    fixture.leads_alone("region2").await;
    let (code, plan) = fixture.adopt("region2", "dry_run=true").await;
    assert_eq!((code, &plan["possible"]), (200, &json!(true)), "{plan:#}");
    let (code, body) = fixture.failover("region1", "").await;
    assert_eq!((code, body["error"]["code"].as_str()), (409, Some("state_in_doubt")), "{body}");
    let (code, report) = fixture.adopt("region2", "reason=promoted%20by%20hand").await;
    assert_eq!(code, 200, "{report:#}");
    assert_eq!((&report["kind"], &report["reason"]), (&json!("adopted"), &json!("promoted by hand")));
    fixture.discard("region1").await;
    assert_eq!(fixture.whole().await.current_region, "region2");
    let written: bool = fixture.ask("region1", "SELECT to_regclass('written_by_hand') IS NOT NULL").await;
    assert!(written, "what was written is on both");
    assert!(fixture.history().await.verification.unwrap().intact);
}

/// The orchestrator's directory of before a switchover is restored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_is_older_than_the_facts_is_not_acted_upon() {
    let mut fixture = Setup::default().start().await;
    let state = fixture.scratch.path().join("orchestrator/state.json");
    let old = std::fs::read(&state).unwrap();
    let load = Load::start(&fixture.database()).await;
    assert!(fixture.switch("region2").await.success);
    fixture.whole().await;
    fixture.orchestrator.kill9().await.unwrap();
    std::fs::write(&state, old).unwrap();
    fixture.orchestrator.restart().await.unwrap();
    let status = fixture.until("in doubt", |status| says(status, "POST /adopt/")).await;
    assert!(status.doubts.iter().any(|doubt| doubt.contains("has obeyed epoch")), "{status:#?}");
    sleep(QUIET).await;
    // Nothing was done.
    fixture.leads_alone("region2").await;
    load.commits_after(Instant::now(), 10).await;
    let (code, body) = fixture.adopt("region1", "dry_run=true").await;
    assert_eq!(code, 200, "{body:#}");
    let (code, report) = fixture.adopt("region2", "").await;
    assert_eq!(code, 200, "{report:#}");
    assert_eq!(fixture.whole().await.current_region, "region2");
    load.finish().await;
}

/// An orchestrator with a directory of its own: agents do not obey it until a person says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_orchestrator_takes_over_only_by_a_persons_word() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    fixture.orchestrator.kill9().await.unwrap();
    std::fs::remove_dir_all(fixture.scratch.path().join("orchestrator")).unwrap();
    fixture.orchestrator.restart().await.unwrap();
    let url = format!("http://127.0.0.1:{}/status", fixture.orchestrator.port());
    // It is only just starting.
    let said = answered("whom it finds", async || {
        let body = fixture.http.get(&url).send().await?.text().await?;
        anyhow::ensure!(body.contains("has obeyed orchestrator"), "{body}");
        Ok(body)
    })
    .await;
    assert!(said.contains("POST /adopt/"), "{said}");
    let (code, body) = fixture.failover("region2", "").await;
    assert_eq!(code, 503, "{body}");
    let (code, report) = fixture.adopt("region1", "reason=directory%20lost").await;
    assert_eq!(code, 200, "{report:#}");
    assert_eq!(fixture.whole().await.current_region, "region1");
    assert!(fixture.switch("region2").await.success, "it is obeyed");
    fixture.whole().await;
    load.finish().await;
}

/// `pg_ctl start` beside an agent that holds the node stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postmaster_started_beside_its_agent_is_said_and_left_alone() {
    let fixture = Setup::default().start().await;
    let mode = |mode: &str| Some(json!({ "mode": mode }));
    assert_eq!(fixture.call(Method::POST, "/mode", Some(TOKEN), mode("paused")).await.0, 200);
    let data = fixture.cluster.nodes[1].data().to_owned();
    fixture.kill_postmaster("region2");
    fixture.until("stopped", |status| status.nodes[1].role == Role::Stopped).await;
    // Its children outlive it for a moment, and another postmaster does not start beside them.
    fixture
        .agent_until("region2", "without children", |status| {
            matches!(status.postmaster, Postmaster::Stopped { settled: true, .. })
        })
        .await;
    let port = fixture.cluster.nodes[1].port();
    let run = async |arguments: &[&str]| {
        let status = Command::new("setpriv")
            .args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"])
            .arg("/usr/lib/postgresql/15/bin/pg_ctl")
            .arg("-D")
            .arg(&data)
            .args(arguments)
            .current_dir("/")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .await
            .unwrap();
        assert!(status.success(), "{arguments:?}");
    };
    run(&["-w", "-t", &LIMIT.as_secs().to_string(), "-o", &format!("-p {port}"), "start"]).await;
    let pid = fixture.started("region2").unwrap();
    fixture
        .until("said", |status| says(status, "has not started") && status.nodes[1].role == Role::Foreign)
        .await;
    assert_eq!(fixture.call(Method::POST, "/mode", Some(TOKEN), mode("auto")).await.0, 200);
    sleep(QUIET).await;
    assert_eq!(fixture.started("region2"), Some(pid), "left alone");
    // Not waited for: the agent may start its own before pg_ctl looks, which then waits for the end of that one.
    run(&["-m", "fast", "-W", "stop"]).await;
    assert_eq!(fixture.whole().await.current_region, "region1");
}

/// Commits wait for nobody, by a DBA's hand: whoever was in sync is no longer, until it is confirmed again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_of_the_settings_is_seen_and_mended() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let before = fixture.whole().await;
    let db = fixture.admin("region1").await;
    db.batch_execute("ALTER SYSTEM RESET ALL").await.unwrap();
    db.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    fixture.until("noticed", |status| status.epoch > before.epoch).await;
    let status = fixture.whole().await;
    assert!(status.wait_for.contains("region2") && status.sync_set.contains("region2"), "{status:#?}");
    let sql = "SELECT current_setting('synchronous_standby_names')";
    // A session reads it a moment after the server was told to.
    answered("the setting", async || {
        let setting: String = fixture.ask("region1", sql).await;
        anyhow::ensure!(setting.contains("region2"), "{setting}");
        Ok(())
    })
    .await;
    fixture.kill_postmaster("region1");
    fixture.until("failed over", |status| status.current_region == "region2").await;
    fixture.whole().await;
    load.finish().await;
}

/// The standby cannot log in: no copy of the data cures that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_costs_no_data() {
    let fixture = Setup::default().start().await;
    let db = fixture.admin("region1").await;
    let kept: String = db
        .query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'replicator'", &[])
        .await
        .unwrap()
        .get(0);
    db.batch_execute("ALTER ROLE replicator PASSWORD 'another'").await.unwrap();
    let witness = fixture.cluster.nodes[1].data().join("a-file-of-the-old-data");
    std::fs::write(&witness, "").unwrap();
    fixture.kill_postmaster("region2");
    fixture.until("said", |status| says(status, "password authentication failed")).await;
    sleep(QUIET).await;
    assert!(witness.exists(), "nothing was copied");
    db.batch_execute(&format!("ALTER ROLE replicator PASSWORD '{kept}'")).await.unwrap();
    fixture.whole().await;
    assert!(witness.exists(), "nothing was copied");
}

/// A reader on the standby holds a lock that replay needs, and the primary dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_readers_lock_does_not_hold_a_failover_up() {
    let fixture = Setup::default().start().await;
    let db = fixture.admin("region1").await;
    db.batch_execute("CREATE TABLE locked (a int)").await.unwrap();
    let reader = fixture.admin("region2").await;
    let began = Instant::now();
    while reader.batch_execute("BEGIN; SELECT * FROM locked").await.is_err() {
        assert!(began.elapsed() < LIMIT, "the table does not come");
        reader.batch_execute("ROLLBACK").await.unwrap();
        sleep(Duration::from_millis(20)).await;
    }
    db.batch_execute("ALTER TABLE locked ADD COLUMN b int").await.unwrap();
    let load = Load::start(&fixture.database()).await;
    load.commits_after(Instant::now(), 10).await;
    fixture.kill_postmaster("region1");
    let killed = Instant::now();
    load.commits_after(killed, 10).await;
    println!("writes went on {:?} after the kill", killed.elapsed());
    // Postgres by itself lets a reader hold replay up for 30 s.
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
    fixture.whole().await;
    load.finish().await;
}

/// Slots of other people stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_not_ours_survives_a_switchover() {
    let fixture = Setup::default().start().await;
    let db = fixture.admin("region2").await;
    db.batch_execute("SELECT pg_create_physical_replication_slot('of_the_backup')").await.unwrap();
    assert!(fixture.switch("region2").await.success);
    fixture.whole().await;
    assert!(fixture.switch("region1").await.success);
    fixture.whole().await;
    let sql = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'of_the_backup'";
    assert_eq!(fixture.ask::<i64>("region2", sql).await, 1);
}

/// A DBA drops the slot of a standby that is away: it gets a new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_dropped_is_made_again() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    fixture.kill_node("region2").await;
    let db = fixture.admin("region1").await;
    let began = Instant::now();
    while db.batch_execute("SELECT pg_drop_replication_slot('region2')").await.is_err() {
        assert!(began.elapsed() < LIMIT, "the slot stays in use");
        sleep(Duration::from_millis(50)).await;
    }
    fixture.restart_node("region2").await;
    let revived = Instant::now();
    fixture.whole().await;
    println!("whole {:?} after the node came back", revived.elapsed());
    load.finish().await;
}
