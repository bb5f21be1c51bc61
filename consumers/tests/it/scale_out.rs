//! Several consumers on one shared subscription.

use playground::cluster::Options;
use playground::program::Launch;

use crate::floor::{Floor, READINGS, until_metric};

pub(crate) fn member(name: &'static str) -> impl FnOnce(Launch) -> Launch {
    move |launch| {
        launch
            .named(name)
            .set("mqtt_consumer.client_id", name)
            .set("mqtt_consumer.filter", "$share/ingest/og/field/#")
    }
}

#[tokio::test]
async fn members_share_the_load_and_a_killed_one_leaves_its_part_to_its_return() {
    let mut floor = Floor::new(Options::alone(), member("member-a")).await;
    let other = floor.another(member("member-b")).await;
    let mut publisher = floor.publisher();
    publisher.publish_readings(0, 4_000);
    publisher.accepted().await;
    floor.until(READINGS, 4_000).await;
    for consumer in [&floor.consumer, &other] {
        let received = consumer.metrics().await.unwrap().count("ingest_received_total");
        assert!(received > 1_000, "{} took {received} of 4000", consumer.name());
    }

    floor.consumer.kill9().await.unwrap();
    let before = other.metrics().await.unwrap().count("ingest_rows_committed_total");
    publisher.publish_readings(4_000, 8_000);
    publisher.accepted().await;
    // Mosquitto goes on dealing to the member that is away; the one that stays stores its own part meanwhile.
    let expected = 1_000 + before;
    until_metric(&other, "ingest_rows_committed_total", expected).await;
    floor.consumer.restart().await.unwrap();
    floor.until(READINGS, 8_000).await;
}
