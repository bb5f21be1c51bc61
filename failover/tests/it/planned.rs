//! Switchovers of a healthy cluster.

use std::time::Duration;

use tokio::time::Instant;

use crate::fixture::Setup;
use crate::load::{Load, judge};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn back_and_forth_under_load_loses_nothing() {
    let fixture = Setup::default().start().await;
    let load = Load::start(&fixture.database()).await;
    let mut gaps = Vec::new();
    for round in 0..6 {
        let region = if round % 2 == 0 { "region2" } else { "region1" };
        let started = Instant::now();
        let report = fixture.switch(region).await;
        assert!(report.success, "{report:#?}");
        assert_eq!(report.timeline_after, report.timeline_before + 1);
        load.commits_after(Instant::now(), 5).await;
        assert_eq!(
            fixture.whole().await.current_region,
            region,
            "the old primary is a synchronous standby again"
        );
        load.commits_after(Instant::now(), 5).await;
        gaps.push(load.gap_since(started));
        println!(
            "to {region}: write gap {:?}, by the orchestrator {:?} ms, total {:.0} ms, {:?}",
            load.gap_since(started),
            report.write_gap_ms,
            report.total_duration_ms,
            report
                .steps
                .iter()
                .map(|step| format!("{} {:.0}", step.action, step.duration_ms))
                .collect::<Vec<_>>()
        );
        fixture.leads_alone(region).await;
    }
    load.finish().await;
    let history = fixture.history().await;
    assert_eq!(history.failovers.len(), 6);
    assert!(history.verification.unwrap().intact);
    // What something broken would exceed; the promised second is for `make bench-failover`, on a quiet machine.
    judge(gaps, Duration::from_secs(5));
}
