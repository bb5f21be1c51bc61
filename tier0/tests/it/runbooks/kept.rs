//! Both nodes are lost, the one that comes back lacks readings, and the other returns with them: no-primary, then kept-source.

use std::time::Instant;

use failover_api::Role;
use playground::regions::Plan;

use super::COMPOSE;
use super::bed::{Bed, LIMIT};
use super::book::Book;
use super::primaries::{is_over, no_primary};

const BY_REQUEST: &str = "the same by a request: failover/tests/it/hand.rs discards by it";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_forced_failover_lost_is_taken_out_of_the_kept_source() {
    let mut bed = Bed::start(Plan::default()).await;
    bed.kill_node("region2").await;
    bed.alarm("ONE COPY").await;
    bed.commits().await;
    bed.kill_node("region1").await;
    bed.regions.agent("region2").unwrap().restart().await.unwrap();
    bed.until("a standby that is behind", |status| {
        status.primary_condition != "alive" && status.nodes[1].role == Role::Standby
    })
    .await;
    let mut book = no_primary();
    let seen = bed.look(&mut book).await;
    assert!(seen.contains("\"sync_set\": []"), "{seen}");
    let seen = bed.follow(&mut book, "Mitigation 2").await;
    assert!(seen.contains("\"dry_run\": true") && seen.contains("\"kind\": \"forced\""), "{seen}");
    is_over(&bed, &book, Instant::now()).await;

    // The machine was not gone for good.
    bed.regions.agent("region1").unwrap().restart().await.unwrap();
    bed.alarm("runbook kept-source").await;
    bed.until("heard", |status| status.nodes[0].role == Role::Stopped).await;
    let mut book = Book::open(
        "kept-source",
        &[
            ("data=/var/lib/tier0/data", COMPOSE),
            ("curl -s -X POST -H \"Authorization: Bearer $TOKEN\" \"localhost:8003/discard", BY_REQUEST),
        ],
    );
    let seen = bed.look(&mut book).await;
    assert!(seen.contains("\"role\": \"stopped\""), "{seen}");
    for step in ["Mitigation 1", "Mitigation 2", "Mitigation 3"] {
        bed.follow(&mut book, step).await;
    }
    let taken = bed.follow(&mut book, "Mitigation 4").await;
    let counts: Vec<u64> =
        taken.lines().filter_map(|line| line.strip_prefix("INSERT 0 ")?.parse().ok()).collect();
    let [readings, activity, letters, sessions] = counts[..] else { panic!("{counts:?}") };
    assert!(readings >= 100 && activity == 0 && letters == 0, "{counts:?}");
    // One for each batch, and that of a writer when nobody has changed it since.
    assert!((readings / 20..=readings / 20 + 2).contains(&sessions), "{counts:?}");
    bed.follow(&mut book, "Mitigation 5").await;
    bed.follow(&mut book, "Mitigation 6").await;

    book.is_over_when(
        "`failover_kept` is 0 for every node, and `sync_set` in `/status` names the node again.",
    );
    bed.metrics("nothing is kept", |_, it| it.has("failover_kept") && it.count("failover_kept") == 0).await;
    bed.until("in sync", |status| status.sync_set.contains("region1")).await;
    bed.regions.whole(LIMIT).await.unwrap();
    book.close();
    bed.nothing_is_lost().await;
}
