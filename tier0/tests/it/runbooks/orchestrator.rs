//! The orchestrator is away; its directory is lost; its state cannot be read.

use playground::regions::Plan;

use super::bed::{Bed, LIMIT};
use super::book::Book;
use super::{COMPOSE, THE_SAME, state_in_doubt};

const PAGE: &str = "orchestrator-down";
const EXCUSES: [super::Excuse; 2] = [
    ("another orchestrator holds", "what its log says"),
    ("docker compose stop failover-orchestrator\ndocker compose run", COMPOSE),
];

async fn is_over(bed: &Bed, book: &Book) {
    book.is_over_when(
        "`up{job=\"failover-orchestrator\"}` is 1, and `/status` names the primary and a `sync_set` that is not empty.",
    );
    bed.metrics("it is up", |_, _| true).await;
    let status =
        bed.until("a sync set", |status| !status.sync_set.is_empty() && status.doubts.is_empty()).await;
    bed.leads_alone(&status.current_region).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orchestrator_that_is_down_comes_back_with_its_directory_or_without() {
    let mut bed = Bed::start(Plan::default()).await;
    let mut book = Book::open(PAGE, &EXCUSES);

    // It was killed: it goes on where it was.
    bed.regions.orchestrator.kill9().await.unwrap();
    let seen = bed.look(&mut book).await;
    assert!(seen.contains("INFO"), "its log is shown: {seen}");
    bed.commits().await;
    bed.follow(&mut book, "Mitigation 1").await;
    is_over(&bed, &book).await;
    bed.kill_node("region1").await;
    bed.until("failed over", |status| status.current_region == "region2").await;
    bed.commits().await;
    bed.regions.restart_ended().await.unwrap();
    bed.regions.whole(LIMIT).await.unwrap();

    // Its disk was lost.
    let dir = bed.scratch.path().join("orchestrator");
    bed.regions.orchestrator.kill9().await.unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    bed.follow(&mut book, "Mitigation 1").await;
    let mut doubt = state_in_doubt(("tier0 adopt", THE_SAME));
    adopt(&mut bed, &mut doubt).await;
    doubt.close();
    is_over(&bed, &book).await;

    // What is on it is no state.
    bed.regions.orchestrator.kill9().await.unwrap();
    std::fs::write(dir.join("state.json"), "{").unwrap();
    bed.follow(&mut book, "Mitigation 1").await;
    let ended = bed.regions.orchestrator.wait(LIMIT).await.unwrap();
    assert!(!ended.success(), "{ended}");
    let seen = bed.look(&mut book).await;
    assert!(seen.contains("state.json"), "the log names what cannot be read: {seen}");
    bed.follow(&mut book, "Mitigation 3").await;
    bed.follow(&mut book, "Mitigation 1").await;
    let mut doubt = state_in_doubt((
        "curl -s -X POST -H \"Authorization: Bearer $TOKEN\" \"localhost:8003/adopt/region2?reason",
        THE_SAME,
    ));
    adopt(&mut bed, &mut doubt).await;
    doubt.close();
    is_over(&bed, &book).await;

    book.close();
    bed.nothing_is_lost().await;
}

/// state-in-doubt, from an orchestrator that knows nothing. region2 is right: writers write to it.
async fn adopt(bed: &mut Bed, doubt: &mut Book) {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        let seen = bed.look(doubt).await;
        if seen.contains("\"possible\": true") {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{seen}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    bed.follow(doubt, "Mitigation 4").await;
    doubt.is_over_when("`failover_doubts` is 0, and `sync_set` in `/status` is not empty.");
    bed.metrics("no doubt", |_, it| it.has("failover_doubts") && it.count("failover_doubts") == 0).await;
    bed.until("a sync set", |status| !status.sync_set.is_empty()).await;
    bed.commits().await;
}
