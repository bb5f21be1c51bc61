//! The dashboards of `grafana/` against a living system: every query of every panel answers and shows something; every series
//! an alert counts on is exported by somebody; no critical alert fires; what the pages tell people to ask is answered.

mod ask;
mod files;
mod stage;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ask::{Postgres, Prometheus};
use files::{Dashboard, Source, dashboards};
use playground::http;
use stage::Stage;
use tier0::docs::metrics;

use crate::examples::live;

/// From the start of the system to the last empty panel. Exporters are scraped every 15 s, and a rate needs two samples.
const LIMIT: Duration = Duration::from_secs(240);
const PAUSE: Duration = Duration::from_millis(500);

/// One query of one panel, ready to be asked.
struct Question {
    /// Dashboard, panel and query, for messages.
    name: String,
    source: Source,
    text: String,
    instant: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn every_panel_of_every_dashboard_shows_something() {
    let dashboards = dashboards();
    let registries = metrics::registries().unwrap();
    // Made in a thread of their own: they start a runtime.
    let asks = tokio::task::spawn_blocking(crate::examples::asks).await.unwrap();
    let stage = Stage::start().await;
    let prometheus = Prometheus { port: stage.monitoring.port() };
    let postgres = Postgres { db: stage.reader().await };
    let deadline = Instant::now() + LIMIT;

    // Before, variables would have some of their values only.
    let all_up = format!("count(up == 1) == {}", stage.targets);
    while !prometheus.shows(&all_up, true).await.is_ok_and(|shown| shown) {
        let down = prometheus.labels("up == 0").await;
        assert!(Instant::now() < deadline, "not all of {} targets are up: {down:?}", stage.targets);
        tokio::time::sleep(PAUSE).await;
    }

    let mut open = Vec::new();
    for dashboard in &dashboards {
        let questions = loop {
            match questions(dashboard, &prometheus).await {
                Ok(questions) => break questions,
                Err(empty) => assert!(Instant::now() < deadline, "{empty}"),
            }
            tokio::time::sleep(PAUSE).await;
        };
        assert!(questions.len() > 10, "{} has hardly any queries", dashboard.uid);
        open.extend(questions);
    }
    loop {
        let (mut still, mut failed) = (Vec::new(), String::new());
        for question in open {
            let shown = match question.source {
                Source::Prometheus => prometheus.shows(&question.text, question.instant).await,
                Source::Postgres => postgres.shows(&question.text).await,
            };
            match shown {
                Ok(true) => {}
                Ok(false) => still.push(question),
                // Prometheus may be too busy for an answer; what is wrong stays wrong.
                Err(error) => {
                    failed = format!("\n  {}: {error:#}\n    {}", question.name, question.text);
                    still.push(question);
                }
            }
        }
        open = still;
        if open.is_empty() {
            break;
        }
        let list: Vec<String> =
            open.iter().map(|question| format!("{}\n    {}", question.name, question.text)).collect();
        assert!(Instant::now() < deadline, "empty after {LIMIT:?}:\n  {}{failed}", list.join("\n  "));
        tokio::time::sleep(PAUSE).await;
    }

    let names = prometheus.names().await.unwrap();
    let rules = prometheus.rules().await.unwrap();
    assert!(rules.len() > 50, "{} rules", rules.len());
    let mut missing = BTreeSet::new();
    for rule in &rules {
        assert_eq!(rule.health, "ok", "{}: {}", rule.name, rule.error);
        let series = ask::series(&rule.query);
        missing
            .extend(series.into_iter().filter(|name| !names.contains(name)).map(|name| (name, &rule.name)));
        let firing = rule.critical && rule.state == "firing";
        assert!(!firing, "{} fires in a healthy system: {}", rule.name, rule.query);
    }
    assert!(missing.is_empty(), "rules count on series that nobody exports: {missing:?}");

    // docs/metrics.md is made from what the components register: whatever the processes serve must be among that.
    let described: BTreeSet<String> =
        registries.iter().flat_map(|(_, registry)| registry.series()).map(|series| series.name).collect();
    for process in stage.processes() {
        let served = http::get_within(process, "/metrics", LIMIT).await.unwrap().1;
        let served: BTreeSet<&str> =
            served.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        assert!(served.len() > 8, "{served:?}");
        let unknown: Vec<&&str> = served.iter().filter(|name| !described.contains(**name)).collect();
        assert!(unknown.is_empty(), "docs/metrics.md lacks {unknown:?}: see tier0/src/docs/metrics.rs");
    }
    live::ask(&asks, stage.cluster(), &stage.token(), |port| stage.port(port)).await;
    stage.stop().await;
}

/// The queries of a dashboard with its variables put in. `Err` names a variable that has no values yet.
async fn questions(dashboard: &Dashboard, prometheus: &Prometheus) -> Result<Vec<Question>, String> {
    let mut values = Vec::new();
    for (variable, metric, label) in &dashboard.variables {
        let metric = files::replace(metric, &values);
        let found = prometheus.values(&metric, label).await.unwrap();
        if found.is_empty() {
            return Err(format!("{}: variable {variable} has no values: {label} of {metric}", dashboard.uid));
        }
        values.push((variable.clone(), found));
    }
    let panels = dashboard.queries.iter().map(|query| Question {
        name: format!("{} / {}", dashboard.uid, query.panel),
        source: query.source,
        text: files::replace(&query.text, &values),
        instant: query.instant,
    });
    let questions: Vec<Question> = panels.collect();
    for question in &questions {
        assert!(!question.text.contains('$'), "{}: what is {}?", question.name, question.text);
    }
    Ok(questions)
}
