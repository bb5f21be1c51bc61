//! Wrong clocks: of one consumer, of one of two, of every machine at once; from the start, by a step, back again. Nothing
//! stored vanishes, no live reading is refused, it is said loudly, and it goes on by itself.

use std::time::Duration;

use playground::cluster::Options;
use playground::faketime::FakeClock;
use playground::http;
use playground::program::{Launch, Program};
use playground::scratch::Scratch;
use tokio::time::{Instant, sleep};

use crate::floor::{Floor, PATIENCE, READINGS, until_metric};
use crate::scale_out::member;

const LETTERS: &str = "SELECT count(*) FROM dead_letters";
const SUCCEEDED: &str = "ingest_upkeep_last_success_timestamp_seconds";
const ACKNOWLEDGED: &str = "ingest_acknowledged_total";

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for an answer: the process may only be starting.
async fn gauge(program: &Program, name: &str) -> f64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match program.metrics().await {
            Ok(metrics) => return metrics.sum(name),
            Err(error) => assert!(Instant::now() < deadline, "{name} of {}: {error:#}", program.name()),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the process says how far its clock is from the primary's, in hours.
async fn until_offset(program: &Program, hours: f64) {
    until(&format!("{} is off by {hours} h", program.name()), async || {
        (gauge(program, "ingest_clock_offset_seconds").await / 3600.0 - hours).abs() < 0.01
    })
    .await;
}

/// Status 0: no answer.
async fn health(program: &Program) -> (u16, String) {
    http::get(program.port(), "/health/ready").await.unwrap_or_else(|error| (0, format!("{error:#}")))
}

async fn until_health(program: &Program, status: u16) {
    until(&format!("{} says {status}", program.name()), async || health(program).await.0 == status).await;
}

/// Waits until the process has looked for old partitions twice more.
async fn two_more_looks(program: &Program) {
    for _ in 0..3 {
        let before = gauge(program, SUCCEEDED).await;
        // Not "greater": the clock it is of may have been set back.
        until("a look", async || gauge(program, SUCCEEDED).await != before).await;
    }
}

fn log(program: &Program) -> String {
    std::fs::read_to_string(program.log()).unwrap()
}

/// Publishes `count` live readings more and waits until all there are so far are stored, and nothing else.
struct Books {
    published: usize,
}

impl Books {
    async fn live(&mut self, floor: &Floor, count: usize) {
        let mut publisher = floor.publisher();
        publisher.publish_readings(self.published, self.published + count);
        self.published += count;
        publisher.accepted().await;
        floor.until(READINGS, self.published as i64).await;
        self.hold(floor).await;
    }

    /// Everything that was published is stored, and no letter.
    async fn hold(&self, floor: &Floor) {
        floor.until(READINGS, self.published as i64).await;
        floor.until(LETTERS, 0).await;
    }
}

fn with(clock: &FakeClock) -> impl FnOnce(Launch) -> Launch {
    let environment = clock.environment();
    move |launch| launch.envs(environment)
}

#[tokio::test]
async fn a_consumer_whose_clock_is_set_wrong_drops_nothing_and_refuses_nothing() {
    let scratch = Scratch::new().unwrap();
    let clock = FakeClock::new(scratch.path(), "consumer").unwrap();
    let floor = Floor::new(Options::alone(), with(&clock)).await;
    let mut books = Books { published: 0 };
    books.live(&floor, 500).await;
    for (offset, hours) in [("+30h", 30.0), ("-30h", -30.0), ("+8760h", 8760.0), ("-700", -700.0 / 3600.0)] {
        clock.set(offset).unwrap();
        // At once, before the consumer has asked the primary.
        books.live(&floor, 100).await;
        until_offset(&floor.consumer, hours).await;
        books.live(&floor, 100).await;
        until("health says so", async || {
            let (status, body) = health(&floor.consumer).await;
            status == 503 && body.contains("the clocks are") && body.contains("the primary's")
        })
        .await;
        two_more_looks(&floor.consumer).await;
        books.hold(&floor).await;
        until(offset, async || log(&floor.consumer).contains("are apart: nothing is dropped")).await;
        clock.set("+0").unwrap();
        until("it is ready again", async || health(&floor.consumer).await.0 == 200).await;
        books.live(&floor, 100).await;
        until("the clocks agree", async || gauge(&floor.consumer, "ingest_clock_uncertain").await == 0.0)
            .await;
    }
    // Partitions of the wrong times are not in the way, and what is really too far ahead is refused as ever.
    let later = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(20);
    let mut publisher = floor.publisher();
    publisher.publish(&crate::floor::topic(1), crate::floor::reading(1, &later.to_string()));
    publisher.accepted().await;
    floor.until(LETTERS, 1).await;
    floor.until(READINGS, books.published as i64).await;
}

#[tokio::test]
async fn a_consumer_that_starts_with_a_wrong_clock_does_no_harm() {
    let scratch = Scratch::new().unwrap();
    let clock = FakeClock::new(scratch.path(), "consumer").unwrap();
    let mut floor = Floor::new(Options::alone(), with(&clock)).await;
    let mut books = Books { published: 0 };
    books.live(&floor, 500).await;
    for offset in ["+30h", "-30h"] {
        floor.consumer.terminate(PATIENCE).await.unwrap();
        clock.set(offset).unwrap();
        floor.consumer.restart().await.unwrap();
        books.live(&floor, 200).await;
        two_more_looks(&floor.consumer).await;
        books.hold(&floor).await;
        until_health(&floor.consumer, 503).await;
    }
    clock.set("+0").unwrap();
    floor.consumer.ready(PATIENCE).await.unwrap();
    books.live(&floor, 100).await;
}

/// One machine runs everything, or all follow one wrong time server.
#[tokio::test]
async fn clocks_that_jump_together_are_not_believed_before_readings_agree() {
    let scratch = Scratch::new().unwrap();
    let clock = FakeClock::new(scratch.path(), "all").unwrap();
    let mut floor = Floor::new(Options::alone(), with(&clock)).await;
    let primary = floor.cluster.primary_mut();
    primary.set_environment(clock.environment());
    primary.restart().await.unwrap();
    let mut books = Books { published: 0 };
    books.live(&floor, 500).await;
    for offset in ["+30h", "-30h", "+900"] {
        clock.set(offset).unwrap();
        books.live(&floor, 100).await;
        until("it is said", async || gauge(&floor.consumer, "ingest_clock_uncertain").await == 1.0).await;
        until(offset, async || log(&floor.consumer).contains("the clocks have jumped")).await;
        // The two agree with one another.
        until_offset(&floor.consumer, 0.0).await;
        books.live(&floor, 300).await;
        two_more_looks(&floor.consumer).await;
        books.hold(&floor).await;
        assert_eq!(
            gauge(&floor.consumer, "ingest_clock_uncertain").await,
            1.0,
            "{offset}: no reading agrees"
        );
        clock.set("+0").unwrap();
        let deadline = Instant::now() + PATIENCE;
        while gauge(&floor.consumer, "ingest_clock_uncertain").await != 0.0 {
            assert!(Instant::now() < deadline, "readings did not confirm the time after {offset}");
            books.live(&floor, 50).await;
        }
    }
    books.live(&floor, 100).await;
}

/// Everything was off, then everything starts with a wrong clock: what is stored tells.
#[tokio::test]
async fn clocks_that_are_wrong_together_from_the_start_are_known_by_what_is_stored() {
    let scratch = Scratch::new().unwrap();
    let clock = FakeClock::new(scratch.path(), "all").unwrap();
    let mut floor = Floor::new(Options::alone(), with(&clock)).await;
    floor.cluster.primary_mut().set_environment(clock.environment());
    let mut books = Books { published: 0 };
    books.live(&floor, 500).await;
    for offset in ["+30h", "-30h"] {
        floor.consumer.terminate(PATIENCE).await.unwrap();
        clock.set(offset).unwrap();
        floor.cluster.primary_mut().restart().await.unwrap();
        floor.consumer.restart().await.unwrap();
        floor.consumer.ready(PATIENCE).await.unwrap();
        until("it is said", async || gauge(&floor.consumer, "ingest_clock_uncertain").await == 1.0).await;
        books.live(&floor, 300).await;
        two_more_looks(&floor.consumer).await;
        books.hold(&floor).await;
    }
}

/// The database's machine alone: one consumer, then another that starts meanwhile and has no memory of better times.
#[tokio::test]
async fn a_primary_with_a_wrong_clock_is_not_believed_alone() {
    let scratch = Scratch::new().unwrap();
    let clock = FakeClock::new(scratch.path(), "primary").unwrap();
    let mut floor = Floor::new(Options::alone(), |launch| launch).await;
    let primary = floor.cluster.primary_mut();
    primary.set_environment(clock.environment());
    primary.restart().await.unwrap();
    let mut books = Books { published: 0 };
    books.live(&floor, 500).await;
    for (offset, hours) in [("+30h", -30.0), ("-30h", 30.0)] {
        clock.set(offset).unwrap();
        books.live(&floor, 100).await;
        until_offset(&floor.consumer, hours).await;
        books.live(&floor, 100).await;
        floor.consumer.kill9().await.unwrap();
        floor.consumer.restart().await.unwrap();
        books.live(&floor, 100).await;
        two_more_looks(&floor.consumer).await;
        books.hold(&floor).await;
    }
    clock.set("+0").unwrap();
    floor.consumer.ready(PATIENCE).await.unwrap();
    books.live(&floor, 100).await;
}

#[tokio::test]
async fn one_of_two_consumers_drifts_away_and_comes_back() {
    let scratch = Scratch::new().unwrap();
    let clock = FakeClock::new(scratch.path(), "member-a").unwrap();
    // The first is elected to keep the partitions.
    let floor = Floor::new(Options::alone(), |launch| with(&clock)(member("member-a")(launch))).await;
    until("it is elected", async || gauge(&floor.consumer, SUCCEEDED).await > 0.0).await;
    let right = floor.another(member("member-b")).await;
    let other = &floor.consumer;
    let mut books = Books { published: 0 };
    books.live(&floor, 500).await;
    // A minute a step: far more than any clock drifts between two questions.
    for minutes in (1..=12).chain([1_800, -1_800]) {
        clock.set(&format!("{:+}", minutes * 60)).unwrap();
        books.live(&floor, 100).await;
    }
    until_offset(other, -30.0).await;
    until_health(other, 503).await;
    // The other one is right.
    until_health(&right, 200).await;
    until("the other one is elected", async || gauge(&right, SUCCEEDED).await > 0.0).await;
    two_more_looks(&right).await;
    books.live(&floor, 400).await;
    let received = other.metrics().await.unwrap().count("ingest_received_total");
    assert!(received > 500, "it goes on taking its part: {received}");
    clock.set("+0").unwrap();
    until("it is ready again", async || health(other).await.0 == 200).await;
    books.live(&floor, 100).await;
    until_metric(other, ACKNOWLEDGED, 1).await;
}
