//! Somebody changes `dead_letters`: what needs a letter is held, and whoever looks is told.

use std::time::Duration;

use playground::cluster::Options;
use tokio::time::{Instant, sleep};

use crate::drift::{Writing, letters, until};
use crate::fixture::{Fixture, message};

/// Good readings and broken ones, with the table of letters changed: nothing is acknowledged, the gauge stays up and health down
/// until it is changed back.
async fn check_held(change: &str, back: &str) {
    let fixture = Fixture::new(Options::alone()).await;
    fixture.db.batch_execute(change).await.unwrap();
    let writing = Writing::start(&fixture);
    let mut messages: Vec<_> = (0..30).map(|n| fixture.delivery(n, 0, "{}")).collect();
    messages.extend((30..33).map(|n| message(n, "not json")));
    writing.send(messages);
    let metrics = &writing.metrics;
    until("the batch is held", async || metrics.held_by_schema.get() > 0).await;
    let (tries, deadline) = (metrics.retries.get(), Instant::now() + Duration::from_secs(120));
    while metrics.retries.get() < tries + 4 {
        assert_eq!(metrics.held_by_schema.get(), 1, "{change}");
        assert!(Instant::now() < deadline, "{change}: it is tried again");
        sleep(Duration::from_millis(1)).await;
    }
    until("it is said", async || fixture.health.failing().contains_key("postgres")).await;
    assert!(writing.settlements.try_take().is_none(), "{change}: nothing is acknowledged");
    fixture.db.batch_execute(back).await.unwrap();
    let settled = writing.settled(33).await;
    assert_eq!(settled.iter().filter(|settled| settled.rejected.is_some()).count(), 3, "{change}");
    assert_eq!(fixture.readings().await, 30, "{change}");
    let letters = letters(&fixture).await;
    assert_eq!(letters.len(), 3, "{change}: {letters:?}");
    writing.end().await;
    until("it is well again", async || fixture.health.failing().is_empty()).await;
}

#[tokio::test]
async fn a_new_column_without_a_default_holds_the_letters() {
    check_held(
        "ALTER TABLE dead_letters ADD COLUMN extra int NOT NULL",
        "ALTER TABLE dead_letters DROP COLUMN extra",
    )
    .await;
}

#[tokio::test]
async fn a_constraint_holds_the_letters() {
    check_held(
        "ALTER TABLE dead_letters ADD CONSTRAINT closed CHECK (reason = 'none') NOT VALID",
        "ALTER TABLE dead_letters DROP CONSTRAINT closed",
    )
    .await;
}

/// The letter that is offered to see whether the table takes any is another one.
#[tokio::test]
async fn a_constraint_that_refuses_these_letters_only_holds_them() {
    check_held(
        "ALTER TABLE dead_letters ADD CONSTRAINT not_these CHECK (payload <> 'not json')",
        "ALTER TABLE dead_letters DROP CONSTRAINT not_these",
    )
    .await;
}

#[tokio::test]
async fn a_unique_index_holds_the_letters() {
    check_held("CREATE UNIQUE INDEX single ON dead_letters (received_at, source)", "DROP INDEX single").await;
}

#[tokio::test]
async fn a_trigger_that_swallows_them_holds_the_letters() {
    check_held(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; \
         CREATE TRIGGER swallow BEFORE INSERT ON dead_letters FOR EACH ROW EXECUTE FUNCTION swallow()",
        "DROP FUNCTION swallow() CASCADE",
    )
    .await;
}

#[tokio::test]
async fn a_right_that_is_gone_holds_the_letters() {
    check_held("REVOKE INSERT ON dead_letters FROM tier0", "GRANT INSERT ON dead_letters TO tier0").await;
}

#[tokio::test]
async fn a_default_partition_that_is_gone_holds_the_letters() {
    check_held(
        "ALTER TABLE dead_letters DETACH PARTITION dead_letters_default",
        "ALTER TABLE dead_letters ATTACH PARTITION dead_letters_default DEFAULT",
    )
    .await;
}
