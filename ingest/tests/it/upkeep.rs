//! Partitions are made, indexed and dropped beside writers.

use ingest::partitions::{self, Layout};
use playground::cluster::Options;

use crate::fixture::{Fixture, layout};

#[tokio::test]
async fn partitions_come_and_go_while_a_writer_has_the_table_open() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut client = fixture.database.client().await.unwrap();
    // A writer in the middle of its transaction must not be waited for by making or indexing a partition.
    let writer = fixture.db.transaction().await.unwrap();
    let time = jiff::Timestamp::from_microsecond(fixture.now_us).unwrap();
    let insert = format!("INSERT INTO device_telemetry VALUES ('D', 't', 's', '{time}', null, '{{}}')");
    writer.batch_execute(&insert).await.unwrap();

    let layout = layout();
    let hour_ago = fixture.now_us - 3_600_000_000;
    let made = partitions::ensure(&mut client, &layout, &layout.cells_between(hour_ago, fixture.now_us))
        .await
        .unwrap();
    assert_eq!(made, 60, "an hour of one minute each, the newest was there");
    assert_eq!(
        partitions::ensure(&mut client, &layout, &layout.cells_between(hour_ago, fixture.now_us))
            .await
            .unwrap(),
        0
    );
    let list = partitions::list(&client).await.unwrap();
    assert_eq!(list.len(), 61);
    writer.commit().await.unwrap();

    partitions::index_device(&client, &list[0]).await.unwrap();
    partitions::index_device(&client, &list[0]).await.unwrap();
    // A process that died between detaching and dropping.
    let orphan = format!("ALTER TABLE device_telemetry DETACH PARTITION {}", list[2].name);
    client.batch_execute(&orphan).await.unwrap();
    partitions::finish_drops(&client).await.unwrap();
    let tables = format!("SELECT count(*) FROM pg_class WHERE relname = '{}'", list[2].name);
    assert_eq!(fixture.count(&tables).await, 0);
    partitions::ensure(&mut client, &layout, &[list[2].span.0]).await.unwrap();

    partitions::drop_expired(&client, &list[1]).await.unwrap();
    let after = partitions::list(&client).await.unwrap();
    assert_eq!(after.len(), 60);
    assert!(after[0].indexed && !after[1].indexed);
    assert!(!after.contains(&list[1]));
    assert_eq!(fixture.readings().await, 1);

    let finer = Layout { width_us: 30_000_000, ..layout };
    let made = partitions::ensure(&mut client, &finer, &finer.cells_between(hour_ago, fixture.now_us))
        .await
        .unwrap();
    assert_eq!(made, 2, "another width fills the gap only");
}
