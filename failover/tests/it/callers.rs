//! Callers that go away, and calls that are answered although something keeps failing.

use std::time::Duration;

use tokio::time::Instant;

use crate::fixture::{LIMIT, Setup, TOKEN};
use crate::load::Load;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_hangs_up_leaves_nothing_behind() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    // The switchover begins and cannot end while its source is frozen.
    fixture.agents[0].pause();
    let deadline = Instant::now() + LIMIT;
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

/// The standby can be seen and not be detached: its configuration cannot be written. The stopped primary is whole: after two
/// tries it is started where it is, and the history tells of them once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_no_standby_can_be_detached_the_stopped_primary_goes_on() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let obstacle = fixture.cluster.nodes[1].data().join("postgresql.auto.conf.tier0-new");
    std::fs::create_dir(&obstacle).unwrap();
    fixture.kill_postmaster("region1");
    let killed = Instant::now();
    load.commits_after(killed, 10).await;
    assert!(killed.elapsed() < Duration::from_secs(60), "writes go on after {:?}", killed.elapsed());
    fixture.leads_alone("region1").await;
    let tries = fixture.history().await.failovers;
    assert_eq!(tries.len(), 1, "{tries:#?}");
    assert!(!tries[0].success && tries[0].error.as_ref().unwrap().step == "fence", "{tries:#?}");
    std::fs::remove_dir(&obstacle).unwrap();
    fixture.whole().await;
    load.finish().await;
}
