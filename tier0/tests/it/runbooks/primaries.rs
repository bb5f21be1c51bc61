//! Two primaries, and none.

use std::time::Instant;

use failover_api::Role;
use playground::link::After;
use playground::postgres::Role as Account;
use playground::regions::Plan;

use tokio::task::JoinSet;

use super::COMPOSE;
use super::bed::{Bed, LIMIT};
use super::book::Book;

/// region1 slept while region2 took over, and wakes where the orchestrator does not reach its agent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_primaries_the_stray_one_is_stopped_and_comes_back() {
    let mut bed = Bed::start(Plan { linked: true, ..Plan::default() }).await;
    let mut book = Book::open("two-primaries", &[("docker compose run --rm --no-deps region1 cp", COMPOSE)]);
    // First the link: an order that waits for the agent would be carried out when it wakes.
    bed.regions.links[0].cut();
    bed.regions.agents[0].pause();
    bed.until("failed over", |status| status.current_region == "region2" && !status.failover_under_way).await;
    bed.regions.agents[0].resume();
    bed.writable_are(2).await;

    // Somebody who has chosen the wrong node: it never says that this is stored.
    let stray = bed.cluster.nodes[0].connect(Account::Admin).await.unwrap();
    stray.batch_execute("SET synchronous_commit = local; CREATE TABLE elsewhere (a int)").await.unwrap();
    stray.batch_execute("SET synchronous_commit = on").await.unwrap();
    let mut waits = JoinSet::new();
    waits.spawn(async move { stray.batch_execute("INSERT INTO elsewhere VALUES (1)").await });

    let seen = bed.look(&mut book).await;
    assert!(seen.contains("\"current_region\": \"region2\""), "{seen}");
    assert_eq!(seen.matches("\n f ").count(), 2, "both say that they are primaries: {seen}");
    bed.commits().await;
    bed.follow(&mut book, "Mitigation 2").await;
    assert!(
        waits.join_next().await.unwrap().unwrap().is_err(),
        "what waits for the standby is not acknowledged"
    );
    bed.leads_alone("region2").await;
    bed.follow(&mut book, "Mitigation 3").await;
    assert!(bed.scratch.path().join("region1-saved/PG_VERSION").is_file());
    bed.regions.links[0].restore(After::Reset);
    bed.follow(&mut book, "Mitigation 4").await;

    book.is_over_when(
        "`sum(region_agent_postgres_writable)` is 1, and `sync_set` in `/status` names the other node.",
    );
    bed.until("in sync", |status| status.sync_set.contains("region1")).await;
    bed.writable_are(1).await;
    book.close();
    bed.nothing_is_lost().await;
}

/// The primary dies while automatic failover is switched off. (Its second step is in kept.rs.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_primary_the_failover_follows_when_it_is_no_longer_paused() {
    let mut bed = Bed::start(Plan::default()).await;
    let mut book = no_primary();
    bed.post("/mode", r#"{"mode":"paused"}"#).await;
    bed.kill_node("region1").await;
    bed.alarm("automatic failover is paused").await;
    assert!(bed.writable().await.is_empty());
    let seen = bed.look(&mut book).await;
    assert!(seen.contains("\"mode\": \"paused\""), "{seen}");
    bed.follow(&mut book, "Mitigation 1").await;
    is_over(&bed, &book, Instant::now()).await;
    bed.leads_alone("region2").await;
    // The machine is back.
    bed.regions.restart_ended().await.unwrap();
    let status = bed.regions.whole(LIMIT).await.unwrap();
    assert_eq!(status.nodes[0].role, Role::Standby);
    bed.nothing_is_lost().await;
}

pub(super) fn no_primary() -> Book {
    Book::open(
        "no-primary",
        &[
            ("pg_ctl promote", "what nobody is to do"),
            ("mode: paused", "what is seen"),
            ("sync_set: []", "what is seen"),
        ],
    )
}

pub(super) async fn is_over(bed: &Bed, book: &Book, since: Instant) {
    book.is_over_when(
        "`sum(region_agent_postgres_writable)` is 1 and the consumers commit (`ingest_oldest_unacknowledged_seconds` below 1).",
    );
    bed.writers.as_ref().unwrap().commit_after(since).await;
    bed.writable_are(1).await;
}
