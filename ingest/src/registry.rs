//! The ten sites and the 100,000 devices of the fleet, as reference tables.

use anyhow::Context;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use tokio_postgres::Client;
use wire::fleet::{Device, SITES};

use crate::copy;

/// How many devices the fleet has.
pub const DEVICES: u32 = 100_000;

/// Fills `sites` and `device_registry`; what is there already stays. Devices go by COPY through a staging table, in
/// one transaction.
///
/// # Errors
/// When the database refuses or is lost; nothing is half filled.
pub async fn fill(client: &Client) -> anyhow::Result<()> {
    let count: i64 = client.query_one("SELECT count(*) FROM device_registry", &[]).await?.get(0);
    if count >= i64::from(DEVICES) {
        return Ok(());
    }
    client
        .batch_execute("BEGIN; CREATE TEMP TABLE registry_staging (LIKE device_registry) ON COMMIT DROP")
        .await
        .context("begin to fill the registry")?;
    for site in &SITES {
        client
            .execute(
                "INSERT INTO sites VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                &[&site.site_id, &site.lat, &site.lon],
            )
            .await
            .context("fill sites")?;
    }
    let mut rows = BytesMut::with_capacity(8 << 20);
    rows.put_slice(copy::HEADER);
    for number in 0..DEVICES {
        let device = Device::new(number);
        copy::row(&mut rows, 4);
        copy::text(&mut rows, &device.device_id());
        copy::text(&mut rows, device.device_type.name);
        copy::text(&mut rows, device.site.site_id);
        copy::text(&mut rows, device.firmware());
    }
    rows.put_slice(copy::TRAILER);
    let sink = client
        .copy_in::<_, Bytes>("COPY registry_staging FROM STDIN BINARY")
        .await
        .context("copy the registry")?;
    futures_util::pin_mut!(sink);
    for message in copy::messages(rows.freeze()) {
        sink.send(message).await?;
    }
    sink.finish().await.context("copy the registry")?;
    client
        .batch_execute(
            "INSERT INTO device_registry SELECT * FROM registry_staging ON CONFLICT DO NOTHING; COMMIT; \
             ANALYZE device_registry",
        )
        .await
        .context("fill the registry")
}
