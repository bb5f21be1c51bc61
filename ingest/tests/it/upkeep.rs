//! Partitions are made, indexed and dropped beside writers.

use ingest::partitions::{self, Layout, Table};
use playground::cluster::Options;

use crate::fixture::{Fixture, connected, layout};

const TELEMETRY: Table = Table::DeviceTelemetry;

#[tokio::test]
async fn partitions_come_and_go_while_a_writer_has_the_table_open() {
    let mut fixture = Fixture::new(Options::alone()).await;
    let mut client = connected(&fixture.database).await;
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
    let list = partitions::list(&client, TELEMETRY).await.unwrap().partitions;
    assert_eq!(list.len(), 61);
    writer.commit().await.unwrap();

    partitions::index_device(&client, &list[0]).await.unwrap();
    partitions::index_device(&client, &list[0]).await.unwrap();
    partitions::drop_expired(&client, TELEMETRY, &list[1], None).await.unwrap();
    let after = partitions::list(&client, TELEMETRY).await.unwrap().partitions;
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

#[tokio::test]
async fn only_what_was_marked_is_dropped_and_a_kept_table_does_not_stand_in_the_way() {
    let fixture = Fixture::new(Options::alone()).await;
    let mut client = connected(&fixture.database).await;
    let layout = layout();
    let hour_ago = fixture.now_us - 3_600_000_000;
    partitions::ensure(&mut client, &layout, &layout.cells_between(hour_ago, fixture.now_us)).await.unwrap();
    let list = partitions::list(&client, TELEMETRY).await.unwrap().partitions;
    // An administrator detaches one to archive it; a process of ours died between detaching another and dropping it.
    for (partition, marked) in [(&list[2], false), (&list[3], true)] {
        if marked {
            let mark = "tier0: expired, about to be dropped";
            client
                .batch_execute(&format!("COMMENT ON TABLE {} IS '{mark}'", partition.quoted()))
                .await
                .unwrap();
        }
        let detach = format!("ALTER TABLE device_telemetry DETACH PARTITION {}", partition.quoted());
        client.batch_execute(&detach).await.unwrap();
    }
    let drops = partitions::finish_drops(&client, TELEMETRY).await.unwrap();
    assert_eq!(drops.dropped, [list[3].name.clone()]);
    assert_eq!(partitions::finish_drops(&client, TELEMETRY).await.unwrap().dropped, [""; 0]);
    let names = partitions::taken_names(&client, TELEMETRY).await.unwrap();
    assert!(names.contains(&list[2].name) && !names.contains(&list[3].name));

    // Readings of its minute come again.
    let made = partitions::ensure(&mut client, &layout, &[list[2].span.0, list[3].span.0]).await.unwrap();
    assert_eq!(made, 2);
    let again = partitions::list(&client, TELEMETRY).await.unwrap().partitions;
    assert_eq!(again[2].span, list[2].span);
    assert_eq!(again[2].name, format!("{}_b2", list[2].name));
    assert_eq!(again[3].name, list[3].name);
    // And another one that was marked and is not dropped after all: whoever detaches it keeps it.
    let mark = format!("COMMENT ON TABLE {} IS 'tier0: expired, about to be dropped'", again[4].quoted());
    client.batch_execute(&mark).await.unwrap();
    let marked = partitions::list(&client, TELEMETRY).await.unwrap().partitions;
    assert!(marked[4].marked);
    partitions::clear_marks(&client, marked.iter()).await.unwrap();
    let detach = format!("ALTER TABLE device_telemetry DETACH PARTITION {}", again[4].quoted());
    client.batch_execute(&detach).await.unwrap();
    assert_eq!(partitions::finish_drops(&client, TELEMETRY).await.unwrap().dropped, [""; 0]);
}

/// What an administrator may have made of the table: a default partition, one without a lower bound, a name that must be
/// quoted.
#[tokio::test]
async fn partitions_that_others_made_are_understood() {
    let fixture = Fixture::new(Options::alone()).await;
    let mut client = connected(&fixture.database).await;
    let layout = layout();
    client
        .batch_execute(
            "CREATE TABLE \"Odd one\" PARTITION OF device_telemetry FOR VALUES FROM (MINVALUE) TO ('2001-01-01Z');
             CREATE TABLE later PARTITION OF device_telemetry FOR VALUES FROM ('2100-01-01Z') TO ('infinity');
             CREATE TABLE rest PARTITION OF device_telemetry DEFAULT",
        )
        .await
        .unwrap();
    let hour_ago = fixture.now_us - 3_600_000_000;
    let time = jiff::Timestamp::from_microsecond(hour_ago).unwrap();
    let insert = format!("INSERT INTO device_telemetry VALUES ('D', 't', 's', '{time}', null, '{{}}')");
    client.batch_execute(&insert).await.unwrap();
    // Its row is in the default partition, and moves.
    let cells = layout.cells([hour_ago].into_iter());
    assert_eq!(partitions::ensure(&mut client, &layout, &cells).await.unwrap(), 1);
    assert_eq!(fixture.count("SELECT count(*) FROM rest").await, 0);
    assert_eq!(fixture.readings().await, 1);
    let listing = partitions::list(&client, TELEMETRY).await.unwrap();
    assert_eq!(listing.default.as_deref(), Some("\"public\".\"rest\""));
    assert_eq!(listing.partitions.len(), 4);
    let odd = &listing.partitions[0];
    assert_eq!((odd.name.as_str(), odd.span.1), ("Odd one", 978_307_200_000_000));
    partitions::index_device(&client, odd).await.unwrap();
    assert!(partitions::list(&client, TELEMETRY).await.unwrap().partitions[0].indexed);
    partitions::drop_expired(&client, TELEMETRY, odd, listing.default.as_deref()).await.unwrap();
    assert_eq!(partitions::list(&client, TELEMETRY).await.unwrap().partitions.len(), 3);
}
