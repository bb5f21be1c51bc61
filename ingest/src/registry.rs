//! The ten sites and the 100,000 devices of the fleet, as reference tables.

use anyhow::{Context, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use tokio_postgres::Client;
use wire::fleet::{Device, SITES};

use crate::{copy, transaction};

/// How many devices the fleet has.
pub const DEVICES: u32 = 100_000;

/// Fills `sites` and `device_registry`; what is there already stays. Devices go by COPY through a staging table, in
/// one transaction.
///
/// # Errors
/// When the database refuses or is lost; nothing is half filled.
pub async fn fill(client: &Client) -> anyhow::Result<()> {
    let count = "SELECT count(*) FROM public.device_registry";
    let before: i64 = client.query_one(count, &[]).await.context("count the registry")?.get(0);
    if before >= i64::from(DEVICES) {
        return Ok(());
    }
    let filled = fill_in_transaction(client).await;
    if filled.is_err() {
        // The session is the caller's, who may go on with it. A lost one is noticed there.
        let rolled_back = transaction::roll_back(client).await;
        tracing::debug!(ok = rolled_back.is_ok(), "the transaction that fills the registry is rolled back");
    }
    filled?;
    client.batch_execute("ANALYZE public.device_registry").await.context("analyze the registry")
}

async fn fill_in_transaction(client: &Client) -> anyhow::Result<()> {
    client
        .batch_execute(
            "BEGIN; CREATE TEMP TABLE registry_staging (LIKE public.device_registry) ON COMMIT DROP",
        )
        .await
        .context("begin to fill the registry")?;
    for site in &SITES {
        client
            .execute(
                "INSERT INTO public.sites VALUES ($1, $2, $3) ON CONFLICT (site_id) DO NOTHING",
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
        .copy_in::<_, Bytes>("COPY pg_temp.registry_staging FROM STDIN BINARY")
        .await
        .context("copy the registry")?;
    futures_util::pin_mut!(sink);
    for message in copy::messages(rows.freeze()) {
        sink.send(message).await.context("copy the registry")?;
    }
    let copied = transaction::finish_copy(sink).await.context("copy the registry")?;
    ensure!(copied == u64::from(DEVICES), "{copied} of {DEVICES} devices were copied");
    client
        .batch_execute(
            "INSERT INTO public.device_registry SELECT * FROM pg_temp.registry_staging ON CONFLICT (device_id) DO NOTHING",
        )
        .await
        .context("fill the registry")?;
    transaction::commit(client).await.context("commit the registry")
}
