//! Callers that go away, and calls that are answered although something keeps failing.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tokio::time::Instant;

use crate::fixture::{Setup, TOKEN};
use crate::load::Load;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_hangs_up_leaves_nothing_behind() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    // The switchover begins and cannot end while its source is frozen.
    fixture.agents[0].pause();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !fixture.status().await.failover_under_way {
        assert!(Instant::now() < deadline, "{:#?}", fixture.status().await);
        let url = format!("http://127.0.0.1:{}/failover/region2", fixture.orchestrator.port());
        let request = fixture.http.post(url).bearer_auth(TOKEN).timeout(Duration::from_millis(10));
        // One that comes when the first is known already is refused at once.
        if let Ok(answer) = request.send().await {
            assert!(matches!(answer.status().as_u16(), 409 | 503), "answered although it cannot be through");
        }
    }
    // Nobody waits for the first any more; it is under way all the same.
    let (found, body) = fixture.failover("region2", "").await;
    assert_eq!((found, body["error"]["code"].as_str()), (409, Some("under_way")), "{body}");
    fixture.agents[0].resume();
    fixture.until("through", |status| !status.failover_under_way).await;
    let from = fixture.whole().await.current_region;
    let to = if from == "region1" { "region2" } else { "region1" };
    assert!(fixture.switch(to).await.success, "nothing is under way any more");
    fixture.whole().await;
    load.finish().await;
}

/// A failover that fails again and again rests in between: people are answered, and the history does not fill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_fails_is_not_tried_at_once_again() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    // The standby can be seen and not be detached: its configuration cannot be written.
    let obstacle = fixture.cluster.nodes[1].data().join("postgresql.auto.conf.tier0-new");
    std::fs::create_dir(&obstacle).unwrap();
    fixture.kill_postmaster("region1");
    let began = Instant::now();
    while fixture.history().await.failovers.len() < 4 {
        let asked = Instant::now();
        let body = Some(json!({"mode": "auto"}));
        assert_eq!(fixture.call(Method::POST, "/mode", Some(TOKEN), body).await.0, 200);
        assert!(asked.elapsed() < Duration::from_secs(2), "answered after {:?}", asked.elapsed());
        assert!(began.elapsed() < Duration::from_secs(30), "it is tried again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let tries = fixture.history().await.failovers;
    assert!(began.elapsed() > Duration::from_millis(1400), "4 tries within {:?}", began.elapsed());
    assert!(tries.len() < 8, "{} tries within {:?}", tries.len(), began.elapsed());
    assert!(tries.iter().all(|entry| !entry.success && entry.error.as_ref().unwrap().step == "fence"));
    std::fs::remove_dir(&obstacle).unwrap();
    fixture.until("failed over", |status| status.current_region == "region2").await;
    fixture.whole().await;
    load.finish().await;
}
