//! The orchestrator dies, twice over, and is not missed.

use std::time::Duration;

use playground::port::Port;
use reqwest::Method;
use tokio::time::{Instant, sleep};

use crate::fixture::{Fixture, LIMIT, Setup, TOKEN};
use crate::load::Load;

/// Runs one orchestrator that dies after `step`, then an ordinary one.
async fn die_after(fixture: &mut Fixture, step: &str, cause: impl AsyncFnOnce(&Fixture)) {
    fixture.orchestrator.kill9().await.unwrap();
    let port = fixture.orchestrator.port();
    let mut doomed = fixture
        .launch()
        .named("doomed")
        .envs([("TIER0_CRASH_AFTER".to_owned(), step.to_owned())])
        .start(fixture.scratch.path())
        .await
        .unwrap();
    doomed.ready(LIMIT).await.unwrap();
    std::mem::swap(&mut fixture.orchestrator, &mut doomed);
    // Ready says that it knows the primary; it has to know the target too.
    fixture.whole().await;
    cause(fixture).await;
    fixture.orchestrator.wait(LIMIT).await.unwrap();
    std::mem::swap(&mut fixture.orchestrator, &mut doomed);
    assert_eq!(fixture.orchestrator.port(), port);
    fixture.orchestrator.restart().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_each_step_of_a_switchover_it_finishes_or_undoes_it() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    for step in ["journal", "prepare", "fence", "decide", "promote", "mark", "repoint", "validate", "history"]
    {
        let from = fixture.whole().await.current_region;
        let to = if from == "region1" { "region2" } else { "region1" };
        let entries = fixture.history().await.failovers.len();
        die_after(&mut fixture, step, async |fixture| {
            let url = format!("http://127.0.0.1:{}/failover/{to}", fixture.orchestrator.port());
            let deadline = Instant::now() + LIMIT;
            // The answer never comes; one that comes is a refusal, because something was not as it should be for a moment.
            while let Ok(answer) =
                fixture.http.request(Method::POST, &url).bearer_auth(TOKEN).timeout(LIMIT).send().await
            {
                let status = answer.status();
                let text = answer.text().await.unwrap_or_default();
                assert!(!status.is_success() && Instant::now() < deadline, "after {step}: {status} {text}");
                sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        let status = fixture.whole().await;
        let decided = !matches!(step, "journal" | "prepare");
        println!("after {step}: {} is primary (was {from})", status.current_region);
        if decided {
            // After the fence it was undone, or, the old primary being down by then, failed over to the target.
            assert!(step == "fence" || status.current_region == to, "after {step}: {status:#?}");
        } else {
            assert_eq!(status.current_region, from, "after {step}");
        }
        let history = fixture.history().await;
        assert!(history.failovers.len() > entries, "after {step}: recorded");
        assert!(history.verification.unwrap().intact);
        let mut ids: Vec<_> = history.failovers.iter().map(|report| report.id.clone()).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), history.failovers.len(), "nothing is recorded twice");
        load.commits_after(Instant::now(), 5).await;
        fixture.leads_alone(&status.current_region).await;
    }
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_each_step_of_a_failover_it_finishes_or_starts_again() {
    let mut fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    for step in ["journal", "fence", "decide", "promote", "mark", "history"] {
        let from = fixture.whole().await.current_region;
        die_after(&mut fixture, step, async |fixture| fixture.kill_postmaster(&from)).await;
        let status = fixture.whole().await;
        println!("after {step}: {} is primary (was {from})", status.current_region);
        assert_ne!(status.current_region, from, "after {step}");
        load.commits_after(Instant::now(), 5).await;
        assert!(fixture.history().await.verification.unwrap().intact);
    }
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_orchestrators_one_acts() {
    let mut fixture = Setup::default().start().await;
    let mut second = fixture
        .launch()
        .named("second")
        .start_on(fixture.scratch.path(), Port::free().unwrap())
        .await
        .unwrap();
    let ended = second.wait(LIMIT).await.unwrap();
    assert!(!ended.success());
    let log = std::fs::read_to_string(second.log()).unwrap();
    assert!(log.contains("only one may act"), "{log}");
    fixture.orchestrator.kill9().await.unwrap();
    second.restart().await.unwrap();
    second.ready(LIMIT).await.unwrap();
}

/// The writers need it only for what it does, not for what they do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_go_on_without_it() {
    let mut fixture = Setup::default().start().await;
    fixture.switch("region2").await;
    fixture.whole().await;
    let load = Load::start(&fixture.database()).await;
    fixture.orchestrator.kill9().await.unwrap();
    let since = Instant::now();
    sleep(Duration::from_secs(2)).await;
    load.commits_after(Instant::now(), 20).await;
    // Whoever needed it would wait for ever; a busy disk may take some seconds.
    assert!(load.gap_since(since) < Duration::from_secs(30), "{:?}", load.gap_since(since));
    // A primary that dies meanwhile is replaced as soon as it is back.
    fixture.kill_postmaster("region2");
    fixture.orchestrator.restart().await.unwrap();
    // It may be asked before the kernel has taken the dead postmaster away: then region2 is still well.
    fixture.until("failed over", |status| status.current_region == "region1").await;
    fixture.whole().await;
    load.finish().await;
}
