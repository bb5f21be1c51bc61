//! The whole pipeline: publisher, broker, `mqtt-consumer`, Postgres with its synchronous standby, ledger checked.

use anyhow::{Context, bail};

use super::Measured;
use super::floor::{Floor, PATIENCE, rate};
use crate::postgres::Role;
use crate::procfs;
use crate::verify::stored::{self, Scope};
use crate::verify::{Report, compare};

/// `array` readings in each of `messages` messages; rates are of rows.
pub(super) async fn measure(
    floor: &mut Floor,
    qos: u8,
    messages: u64,
    array: u16,
) -> anyhow::Result<Measured> {
    floor.broker().await?;
    let mut consumer = floor.consumer().await?;
    let mut publisher = floor.publisher(qos, messages, array).await?;
    let rows = messages * u64::from(array);
    let (per_second, count) =
        rate(rows, async || Ok(consumer.metrics().await?.count("ingest_rows_committed_total"))).await?;
    let ledger = floor.ledger(&mut publisher).await?;
    let cpu = consumer.pid().map(procfs::tree_cpu_seconds).unwrap_or_default();
    consumer.terminate(PATIENCE).await?;
    floor.cluster.wait_replayed(PATIENCE).await?;
    let mut nodes = Vec::new();
    for node in &floor.cluster.nodes {
        let mut db = node.connect(Role::Owner).await?;
        let stored = stored::read(&mut db, &ledger, Scope::Everything).await.context("read the tables")?;
        nodes.push(compare(node.name(), &ledger, &stored));
    }
    let report = Report::new(&ledger, nodes);
    if qos > 0 && !report.holds() {
        bail!("the ledger does not match the tables: {}", report.verdict());
    }
    let per_row = cpu * 1e6 / count.max(1) as f64;
    Ok(Measured { per_second, note: format!("{}, consumer {per_row:.1} us/row", report.verdict()) })
}
