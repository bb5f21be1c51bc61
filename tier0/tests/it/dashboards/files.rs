//! The dashboards as files: what must hold before a query is asked, and the queries in them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Prometheus,
    Postgres,
}

pub(super) struct Query {
    pub(super) panel: String,
    pub(super) source: Source,
    pub(super) text: String,
    /// Now, instead of over a range.
    pub(super) instant: bool,
}

pub(super) struct Dashboard {
    pub(super) uid: String,
    /// Name, metric, label: the values are those of the label.
    pub(super) variables: Vec<(String, String, String)>,
    pub(super) queries: Vec<Query>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Loads them all.
pub(super) fn dashboards() -> Vec<Dashboard> {
    let dir = root().join("grafana/dashboards");
    let mut uids = BTreeSet::new();
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        let dashboard = load(&json);
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert_eq!(dashboard.uid, format!("tier0-{stem}"), "{path:?}: the uid is that of the file");
        assert!(uids.insert(dashboard.uid.clone()));
        all.push(dashboard);
    }
    assert_eq!(uids.len(), 5, "{uids:?}");
    all
}

fn load(json: &Value) -> Dashboard {
    let uid = json["uid"].as_str().unwrap().to_owned();
    assert_eq!(json["schemaVersion"], 39, "{uid}");
    let provisioned =
        std::fs::read_to_string(root().join("grafana/provisioning/datasources/tier0.yml")).unwrap();
    let (mut variables, mut chosen) = (Vec::new(), Vec::new());
    for variable in json["templating"]["list"].as_array().unwrap() {
        if variable["type"] == "custom" {
            let value = variable["current"]["value"].as_str().unwrap();
            let offered = variable["query"].as_str().unwrap();
            assert!(offered.split(',').any(|offer| offer == value), "{uid}: {value} is not among {offered}");
            let options = variable["options"].as_array().unwrap();
            let listed: Vec<&str> = options.iter().map(|option| option["value"].as_str().unwrap()).collect();
            assert_eq!(listed.join(","), offered, "{uid}");
            let selected = options.iter().filter(|option| option["selected"] == true);
            assert!(
                selected.map(|option| option["value"].as_str()).eq([Some(value)]),
                "{uid}: selected is {value}"
            );
            let name = variable["name"].as_str().unwrap();
            chosen.push((format!("${{{name}:sqlstring}}"), format!("'{value}'")));
        }
        if variable["type"] != "query" {
            continue;
        }
        let query = variable["query"]["query"].as_str().unwrap();
        let inner = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
        let (metric, label) = inner.rsplit_once(", ").unwrap();
        variables.push((variable["name"].as_str().unwrap().into(), metric.into(), label.into()));
    }
    let mut queries = Vec::new();
    let mut ids = BTreeSet::new();
    for annotation in json["annotations"]["list"].as_array().unwrap() {
        // An annotation is empty when nothing has happened; that it can be read is what counts.
        let text = format!("{} or vector(0)", annotation["expr"].as_str().unwrap());
        let panel = format!("annotation {}", annotation["name"]);
        queries.push(Query { panel, source: Source::Prometheus, text, instant: false });
    }
    for panel in json["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{uid}: two panels have the id of {title}");
        let kind = panel["type"].as_str().unwrap();
        if kind == "row" {
            continue;
        }
        let unit = &panel["fieldConfig"]["defaults"]["unit"];
        assert!(unit.is_string() || matches!(kind, "table" | "state-timeline"), "{uid}: {title} has no unit");
        for link in panel["links"].as_array().into_iter().flatten() {
            let page = link["url"].as_str().unwrap().strip_prefix("${runbooks}/").unwrap();
            assert!(root().join("docs/runbooks").join(page).is_file(), "{uid}: {title}: no runbook {page}");
        }
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{uid}: {title} asks nothing");
        for target in targets {
            let source = target["datasource"]["uid"].as_str().unwrap();
            assert!(provisioned.contains(&format!("uid: {source}\n")), "{uid}: {title}: no source {source}");
            let (source, text) = match target["datasource"]["type"].as_str().unwrap() {
                "prometheus" => (Source::Prometheus, &target["expr"]),
                "postgres" => (Source::Postgres, &target["rawSql"]),
                other => panic!("{uid}: {title}: {other}"),
            };
            let text = text.as_str().unwrap().to_owned();
            let text = chosen.iter().fold(text, |text, (name, value)| text.replace(name, value));
            let panel = format!("{title} ({})", target["refId"].as_str().unwrap());
            queries.push(Query { panel, source, text, instant: target["instant"] == true });
        }
    }
    Dashboard { uid, variables, queries }
}

/// Puts in what Grafana would: every value of each variable ("All"), and its own names.
pub(super) fn replace(text: &str, variables: &[(String, Vec<String>)]) -> String {
    let mut text = text.replace("$__rate_interval", "20s");
    for (name, values) in variables {
        let quoted: Vec<String> =
            values.iter().map(|value| format!("'{}'", value.replace('\'', "''"))).collect();
        text = text.replace(&format!("${{{name}:sqlstring}}"), &quoted.join(","));
        text = text.replace(&format!("${name}"), &format!("({})", values.join("|")));
    }
    while let Some(start) = text.find("$__timeFilter(") {
        let end = start + text[start..].find(')').unwrap();
        let column = text[start + "$__timeFilter(".len()..end].to_owned();
        let range = format!("{column} BETWEEN now() - interval '30 minutes' AND now()");
        text.replace_range(start..=end, &range);
    }
    text
}
