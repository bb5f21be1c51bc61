//! The whole pipeline: publisher, broker, `mqtt-consumer`, Postgres with its synchronous standby, ledger checked.

use anyhow::{Context, bail};

use super::Measured;
use super::floor::{Floor, Load, PATIENCE, rate};
use crate::verify::stored::{self, Scope};
use crate::verify::{Report, compare};
use playground::postgres::Role;
use playground::procfs;

/// Rates are of rows, with trouble of messages settled.
pub(super) async fn measure(floor: &mut Floor, load: Load) -> anyhow::Result<Measured> {
    floor.broker().await?;
    let mut consumer = floor.consumer().await?;
    let mut publisher = floor.publisher(load).await?;
    let counted =
        if load.trouble.is_some() { "ingest_acknowledged_total" } else { "ingest_rows_committed_total" };
    let (per_second, count) =
        rate(load.rows(), async || Ok(consumer.metrics().await?.count(counted))).await?;
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
    if load.qos > 0 && !report.holds() {
        bail!("the ledger does not match the tables: {}", report.verdict());
    }
    let per_row = cpu * 1e6 / count.max(1) as f64;
    Ok(Measured { per_second, note: format!("{}, consumer {per_row:.1} us/row", report.verdict()) })
}
