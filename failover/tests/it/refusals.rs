//! What must not be done is not done, and the answer says why and what to do.

use std::time::Duration;

use failover_api::{Mode, Role, Status};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::fixture::{AGENT_TOKEN, Fixture, LIMIT, Setup, TOKEN};
use crate::load::Load;

fn code(body: &Value) -> &str {
    body["error"]["code"].as_str().unwrap_or("none")
}

/// What must be as before after a refusal.
async fn state(fixture: &Fixture) -> (String, u64, usize) {
    let status = fixture.status().await;
    (status.current_region, status.epoch, fixture.history().await.failovers.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_cluster_refuses_what_makes_no_sense() {
    let fixture = Setup::default().start().await;
    let before = state(&fixture).await;
    for (path, status, expected) in [
        ("/failover/atlantis", 400, "unknown_region"),
        ("/failover/atlantis?dry_run=true", 400, "unknown_region"),
        ("/failover/region1", 409, "already_there"),
        ("/failover/region2?expected_primary=region2", 409, "unexpected_primary"),
    ] {
        let (found, body) = fixture.call(Method::POST, path, Some(TOKEN), None).await;
        assert_eq!((found, code(&body)), (status, expected), "{path}: {body}");
        assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    }
    for token in [None, Some("wrong"), Some(AGENT_TOKEN)] {
        for path in ["/failover/region2", "/failover/region2?dry_run=true", "/mode"] {
            let (found, body) =
                fixture.call(Method::POST, path, token, Some(json!({"mode": "paused"}))).await;
            assert_eq!((found, code(&body)), (401, "unauthorized"), "{path} {token:?}");
        }
    }
    assert_eq!(state(&fixture).await, before);

    let (found, plan) = fixture.failover("region2", "?dry_run=true").await;
    assert_eq!(found, 200, "{plan}");
    assert_eq!(plan["possible"], json!(true), "{plan:#}");
    assert_eq!(plan["kind"], json!("planned"));
    assert_eq!(plan["bytes_at_risk"], json!(0));
    assert!(plan["plan"].as_array().unwrap().contains(&json!("fence")), "{plan:#}");
    assert!(plan["checks"].as_array().unwrap().iter().all(|check| check["ok"] == json!(true)), "{plan:#}");
    assert_eq!(state(&fixture).await, before, "a dry run changes nothing");
}

/// What the HTTP library refuses is answered like everything else: a code, and a sentence that says what to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_is_a_problem_with_a_way_out() {
    let fixture = Setup::default().start().await;
    let before = state(&fixture).await;
    let (people, agents) = (fixture.orchestrator.port(), fixture.agents[0].port());
    let big = format!("{{\"mode\": \"paused\"{}}}", " ".repeat(100_000));
    for (port, token, method, path, body, status, expected) in [
        (people, TOKEN, Method::POST, "/failover/region2?no_such_option=1", None, 400, "bad_request"),
        (people, TOKEN, Method::POST, "/failover/region2?dry_run=maybe", None, 400, "bad_request"),
        (people, "", Method::GET, "/history?limit=many", None, 400, "bad_request"),
        (people, TOKEN, Method::POST, "/mode", Some("{"), 400, "bad_request"),
        (people, TOKEN, Method::POST, "/mode", Some(r#"{"mode":"asleep"}"#), 422, "bad_request"),
        (people, TOKEN, Method::POST, "/mode", None, 415, "not_json"),
        (people, TOKEN, Method::POST, "/mode", Some(big.as_str()), 413, "too_large"),
        (people, "", Method::GET, "/nowhere", None, 404, "not_found"),
        (people, TOKEN, Method::POST, "/failover", None, 404, "not_found"),
        (people, TOKEN, Method::GET, "/mode", None, 405, "method_not_allowed"),
        (agents, AGENT_TOKEN, Method::GET, "/v1/status?after=then", None, 400, "bad_request"),
        (agents, AGENT_TOKEN, Method::POST, "/v1/orders", Some("{}"), 422, "bad_request"),
        (agents, AGENT_TOKEN, Method::POST, "/v1/orders", Some("{"), 400, "bad_request"),
        (agents, AGENT_TOKEN, Method::POST, "/v1/orders", None, 415, "not_json"),
        (agents, AGENT_TOKEN, Method::POST, "/v1/orders", Some(big.as_str()), 413, "too_large"),
        (agents, AGENT_TOKEN, Method::GET, "/v1/nowhere", None, 404, "not_found"),
        (agents, AGENT_TOKEN, Method::DELETE, "/v1/orders", None, 405, "method_not_allowed"),
    ] {
        let url = format!("http://127.0.0.1:{port}{path}");
        // A body that is too large is not read to its end: that connection is of no use any more.
        let request = fixture.http.request(method.clone(), url).header("Connection", "close");
        let mut request = request.bearer_auth(token);
        if let Some(body) = body {
            request = request.header("Content-Type", "application/json").body(body.to_owned());
        }
        let answer = request.send().await.unwrap();
        let found = answer.status().as_u16();
        let body: Value = answer.json().await.unwrap();
        assert_eq!((found, code(&body)), (status, expected), "{method} {path}: {body}");
        let message = body["error"]["message"].as_str().unwrap();
        let says =
            ["openapi.json", "Content-Type: application/json"].iter().any(|what| message.contains(what));
        assert!(says, "what to do? {method} {path}: {message}");
    }
    assert_eq!(state(&fixture).await, before, "nothing was changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_obeys_nobody_but_its_orchestrator() {
    let fixture = Setup::default().start().await;
    let port = fixture.agents[0].port();
    let url = format!("http://127.0.0.1:{port}/v1/orders");
    let order = json!({"epoch": 999_999, "limit_ms": 1000, "what": {"order": "halt", "how": "immediate"}});
    for token in ["", TOKEN] {
        let answer = fixture.http.post(&url).bearer_auth(token).json(&order).send().await.unwrap();
        assert_eq!(answer.status(), 401);
    }
    let old = json!({"epoch": 0, "limit_ms": 1000, "what": {"order": "halt", "how": "immediate"}});
    let answer = fixture.http.post(&url).bearer_auth(AGENT_TOKEN).json(&old).send().await.unwrap();
    assert_eq!(answer.status(), 409, "an epoch that is over");
    let big = "x".repeat(100_000);
    let answer = fixture.http.post(&url).bearer_auth(AGENT_TOKEN).body(big).send().await.unwrap();
    assert!(answer.status().is_client_error());
    fixture.leads_alone("region1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_means_nothing_happens_until_somebody_says_so() {
    let fixture = Setup::default().start().await;
    let paused = Some(json!({"mode": "paused"}));
    assert_eq!(fixture.call(Method::POST, "/mode", Some(TOKEN), paused).await.0, 200);
    assert_eq!(fixture.status().await.mode, Mode::Paused);
    let (found, body) = fixture.failover("region2", "").await;
    assert_eq!((found, code(&body)), (409, "paused"), "{body}");

    fixture.kill_postmaster("region1");
    fixture.until("gone", |status| status.primary_condition == "gone").await;
    // Longer than an automatic failover ever takes.
    sleep(Duration::from_secs(2)).await;
    assert_eq!(fixture.status().await.current_region, "region1");
    fixture.until("said", |status| status.alarms.iter().any(|alarm| alarm.contains("paused"))).await;

    let (found, report) = fixture.failover("region2", "?while_paused=true").await;
    assert_eq!(found, 200, "{report:#}");
    assert_eq!(report["kind"], json!("unplanned"));
    let auto = Some(json!({"mode": "auto"}));
    assert_eq!(fixture.call(Method::POST, "/mode", Some(TOKEN), auto).await.0, 200);
    assert_eq!(fixture.whole().await.current_region, "region2");
}

/// Automatic failover is paused, not the care for writers: a standby that dies does not stop them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_does_not_make_an_outage_of_a_dead_standby() {
    let mut fixture = Setup::default().set("orchestrator.policy.degrade_after", "1s").start().await;
    let load = Load::start(&fixture.database()).await;
    let paused = Some(json!({"mode": "paused"}));
    assert_eq!(fixture.call(Method::POST, "/mode", Some(TOKEN), paused).await.0, 200);
    fixture.kill_node("region2").await;
    fixture.until("degraded", |status| status.sync_set.is_empty() && status.wait_for.is_empty()).await;
    load.commits_after(Instant::now(), 10).await;
    // Whoever paused it may be at work there: it is not started.
    fixture.restart_node("region2").await;
    fixture.until("seen", |status| status.nodes[1].role == Role::Stopped).await;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(2) {
        let role = fixture.status().await.nodes[1].role;
        assert!(matches!(role, Role::Stopped | Role::Unknown), "{role:?}");
        load.commits_after(Instant::now(), 5).await;
    }
    let auto = Some(json!({"mode": "auto"}));
    assert_eq!(fixture.call(Method::POST, "/mode", Some(TOKEN), auto).await.0, 200);
    assert_eq!(fixture.whole().await.current_region, "region1");
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_gets_the_same_answer_and_is_carried_out_once() {
    let mut fixture = Setup::default().start().await;
    let key = [("Idempotency-Key", "night-shift-1")];
    let call = |fixture: &Fixture, path: &'static str| {
        let (http, url) =
            (fixture.http.clone(), format!("http://127.0.0.1:{}{path}", fixture.orchestrator.port()));
        async move {
            let answer = http.post(url).bearer_auth(TOKEN).header(key[0].0, key[0].1).send().await.unwrap();
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
        }
    };
    // Two at once: one is carried out, the other is told so.
    let (first, second) =
        tokio::join!(call(&fixture, "/failover/region2"), call(&fixture, "/failover/region2"));
    let mut found = [first.0, second.0];
    found.sort_unstable();
    assert_eq!(found, [200, 409], "{first:?} {second:?}");
    let report = if first.0 == 200 { first.1 } else { second.1 };
    fixture.whole().await;
    assert_eq!(call(&fixture, "/failover/region2").await, (200, report.clone()));
    fixture.orchestrator.kill9().await.unwrap();
    fixture.orchestrator.restart().await.unwrap();
    fixture.whole().await;
    assert_eq!(call(&fixture, "/failover/region2").await, (200, report), "after a restart too");
    let (found, body) = call(&fixture, "/failover/region1").await;
    assert_eq!((found, code(&body)), (409, "idempotency_key_reused"));
    assert_eq!(fixture.history().await.failovers.len(), 1);
}

/// The standby dies: commits wait, then one copy is allowed, and nothing is promoted automatically; it comes back:
/// two copies again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn degraded_and_back() {
    let mut fixture = Setup::default().set("orchestrator.policy.degrade_after", "1s").start().await;
    let load = Load::start(&fixture.database()).await;
    let killed = Instant::now();
    fixture.kill_node("region2").await;
    load.commits_after(killed + Duration::from_millis(800), 10).await;
    fixture
        .until("degraded", |status| {
            let said = status.alarms.iter().any(|alarm| alarm.contains("ONE COPY"));
            status.sync_set.is_empty() && status.wait_for.is_empty() && said
        })
        .await;
    let waited = load.gap_since(killed);
    assert!(waited >= Duration::from_millis(900), "commits waited for the standby first: {waited:?}");

    let (found, body) = fixture.failover("region2", "").await;
    assert_eq!((found, code(&body)), (412, "target_not_running"), "{body}");
    let postmaster = fixture.postmaster("region1");
    fixture.kill_postmaster("region1");
    let deadline = Instant::now() + LIMIT;
    // Nobody else has everything: it is started where it is.
    while fixture.status().await.primary_condition != "alive"
        || fixture.started("region1").is_none_or(|pid| pid == postmaster)
    {
        assert!(Instant::now() < deadline, "{:#?}", fixture.status().await);
        sleep(Duration::from_millis(20)).await;
    }
    load.commits_after(Instant::now(), 10).await;
    assert!(fixture.history().await.failovers.is_empty());

    fixture.restart_node("region2").await;
    assert_eq!(fixture.whole().await.current_region, "region1");
    fixture
        .until("as before", |status| {
            status.alarms.is_empty() && status.wait_for == ["region2".to_owned()].into()
        })
        .await;
    let waits: String = fixture.ask("region1", "SHOW synchronous_standby_names").await;
    assert_eq!(waits, "FIRST 1 (\"region2\")");
    load.finish().await;
}

/// The primary's machine is gone and the standby is not in sync: only an operator may accept the loss.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loss_needs_a_word_from_an_operator() {
    let mut fixture = Setup::default().set("orchestrator.policy.degrade_after", "500ms").start().await;
    fixture.kill_node("region2").await;
    fixture.until("degraded", |status| status.sync_set.is_empty()).await;
    let db = fixture.admin("region1").await;
    db.batch_execute("CREATE TABLE only_here (a int)").await.unwrap();
    drop(db);
    fixture.kill_node("region1").await;
    fixture.restart_node("region2").await;
    fixture.until("a standby", |status| status.nodes[1].role == Role::Standby).await;
    let (found, body) = fixture.failover("region2", "").await;
    assert_eq!((found, code(&body)), (503, "no_safe_candidate"), "{body}");
    let said = |status: &Status| status.alarms.iter().any(|alarm| alarm.contains("allow_data_loss"));
    let status = fixture.until("said", said).await;
    assert_eq!(status.current_region, "region1", "nothing is promoted by itself");

    let (found, report) = fixture.failover("region2", "?allow_data_loss=true").await;
    assert_eq!(found, 200, "{report:#}");
    assert_eq!(report["kind"], json!("forced"));
    fixture.restart_node("region1").await;
    let kept = |status: &Status| status.nodes[0].kept.is_some() && status.nodes[0].role == Role::Stopped;
    fixture.until("there", kept).await;
    // The only copy of what was lost: nobody rewrites it.
    let control = fixture.agent("region1").await.control;
    sleep(Duration::from_secs(8)).await;
    fixture.until("as it was", kept).await;
    assert_eq!(fixture.agent("region1").await.control, control, "as it was");
    let (found, body) = fixture.call(Method::POST, "/discard/region2", Some(TOKEN), None).await;
    assert_eq!((found, code(&body)), (409, "not_kept"), "{body}");
    fixture.discard("region1").await;
    assert_eq!(fixture.whole().await.current_region, "region2");
    fixture.leads_alone("region2").await;
}

/// A node that never had data, or lost its disk, is cloned, and is as good as any other afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_data_is_cloned_and_can_lead() {
    // It keeps its place in the set meanwhile, so its role and the set alone would not show that it is away.
    let mut fixture = Setup::default().set("orchestrator.policy.degrade_after", "60s").start().await;
    let load = Load::start(&fixture.database()).await;
    fixture.kill_node("region2").await;
    fixture.empty_disk("region2");
    let away = fixture.until("away", |status| !status.nodes[1].streaming).await;
    assert!(away.sync_set.contains("region2"), "{away:#?}");
    fixture.restart_node("region2").await;
    fixture.whole().await;
    assert!(fixture.cluster.nodes[1].data().join("PG_VERSION").is_file());
    assert!(fixture.switch("region2").await.success);
    load.commits_after(Instant::now(), 10).await;
    fixture.whole().await;
    load.finish().await;
}
