//! What a collector is told of a change of the primary.

use std::time::Duration;

use playground::collector::{Collector, Span};

use crate::fixture::Setup;

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_is_one_trace_with_a_span_for_each_step() {
    let collector = Collector::start().await.unwrap();
    // What moved the primary is told of whatever the share of the rest.
    let setup = Setup::default().set("traces.endpoint", collector.endpoint()).set("traces.sample", "0");
    let fixture = setup.start().await;
    let report = fixture.switch("region2").await;
    // They may come in pieces.
    let all = |spans: &[Span]| spans.len() > report.steps.len();
    let spans = collector.until(PATIENCE, all).await.unwrap();
    let [root] = spans.iter().filter(|span| span.parent.is_empty()).collect::<Vec<&Span>>()[..] else {
        panic!("{spans:#?}")
    };
    assert_eq!((root.service.as_str(), root.name.as_str()), ("failover-orchestrator", "failover"));
    for (key, value) in [
        ("tier0.kind", "planned"),
        ("tier0.source", "region1"),
        ("tier0.target", "region2"),
        ("tier0.outcome", "done"),
    ] {
        assert_eq!(root.values[key], value, "{key}");
    }
    assert_eq!(root.count("tier0.epoch"), report.epoch);
    assert_eq!(root.error, None);
    let mut steps: Vec<&Span> = spans.iter().filter(|span| span.parent == root.id).collect();
    steps.sort_by_key(|step| step.count("tier0.step"));
    let reported: Vec<&str> = report.steps.iter().map(|step| step.action.as_str()).collect();
    assert_eq!(steps.iter().map(|step| step.name.as_str()).collect::<Vec<_>>(), reported);
    for (step, record) in steps.iter().zip(&report.steps) {
        assert_eq!(step.trace, root.trace);
        assert_eq!(step.error, None);
        let took = (step.ended - step.started) as f64 / 1e6;
        assert!((took - record.duration_ms).abs() < 0.01, "{step:?} {record:?}");
        // Timestamps are cut to the microsecond somewhere on the way.
        assert!(step.started + 1_000_000 >= root.started && step.ended <= root.ended + 1_000_000, "{step:?}");
    }
    let ordered = steps.windows(2).filter(|pair| pair[1].name != "redis");
    assert!(
        ordered.into_iter().all(|pair| pair[0].ended <= pair[1].started + 1_000_000),
        "one after the other"
    );
}
