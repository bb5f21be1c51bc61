//! The standby dies while somebody has switched failover off, and a slot of nobody holds WAL.

use playground::regions::Plan;

use super::bed::Bed;
use super::book::Book;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_copy_comes_back_and_a_slot_of_nobody_goes() {
    let mut bed = Bed::start(Plan::default()).await;
    bed.post("/mode", r#"{"mode":"paused"}"#).await;
    playground::regions::kill_postmaster(&bed.cluster.nodes[1]).unwrap();
    let db = bed.cluster.nodes[0].admin().await.unwrap();
    db.batch_execute("SELECT pg_create_physical_replication_slot('region9', true)").await.unwrap();
    bed.alarm("ONE COPY").await;
    bed.commits().await;

    let excuses = [("iostat -x 1", "looks until it is interrupted; the test's standby is not slow")];
    let mut book = Book::open("one-copy", &excuses);
    let seen = bed.look(&mut book).await;
    assert!(seen.contains("ONE COPY") && seen.contains("\"sync_set\": []"), "{seen}");
    assert!(seen.contains("region9"), "the slot is seen: {seen}");
    // 1: somebody has paused it.
    let mut paused = Book::open("failover-paused", &[]);
    let seen = bed.look(&mut paused).await;
    assert!(seen.contains("\"mode\": \"paused\""), "{seen}");
    bed.follow(&mut paused, "Mitigation").await;
    paused.is_over_when("`failover_mode_auto` is 1.");
    bed.metrics("resumed", |_, it| it.count("failover_mode_auto") == 1).await;
    paused.close();
    bed.shell.fill_in("NAME", "region9");
    bed.follow(&mut book, "Mitigation 4").await;

    book.is_over_when(
        "`failover_sync_set_size` is at least 1, the lag is near 0, and the slot retains little WAL.",
    );
    bed.metrics("two copies", |_, it| it.count("failover_sync_set_size") >= 1).await;
    bed.until("near", |status| status.nodes[1].lag_bytes.is_some_and(|bytes| bytes < 1 << 20)).await;
    let slots = "SELECT slot_name::text, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) < 16e6 FROM pg_replication_slots";
    let slots = db.query(slots, &[]).await.unwrap();
    let slots: Vec<(String, bool)> = slots.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(slots, [("region2".to_owned(), true)]);
    book.close();
    bed.nothing_is_lost().await;
}
