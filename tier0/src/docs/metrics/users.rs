//! Who reads a series: panels of the dashboards, alerts, recorded series.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use serde_json::Value;

use crate::docs::root;

/// An expression and what it is for.
#[derive(Debug)]
struct User {
    /// Dashboard, [`ALERTS`] or [`RECORDED`].
    place: String,
    name: String,
    words: BTreeSet<String>,
}

/// All of them.
#[derive(Debug)]
pub struct Users(Vec<User>);

const ALERTS: &str = "alerts";
const RECORDED: &str = "recorded";

impl Users {
    /// # Errors
    /// When a dashboard or a file of rules cannot be read.
    pub fn load() -> anyhow::Result<Self> {
        let mut users = Vec::new();
        for (path, text) in read("grafana/dashboards", "json")? {
            dashboard(&text, &mut users).with_context(|| path)?;
        }
        for (path, text) in read("config/prometheus/rules", "yml")? {
            let before = users.len();
            rules(&text, &mut users);
            anyhow::ensure!(users.len() > before, "no rule found in {path}");
        }
        Ok(Self(users))
    }

    /// Who reads a series, for a table.
    #[must_use]
    pub fn of(&self, series: &str) -> String {
        let mut places: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for user in &self.0 {
            let reads = ["", "_bucket", "_sum", "_count"]
                .iter()
                .any(|end| user.words.contains(&format!("{series}{end}")));
            if reads && user.name != series {
                places.entry(&user.place).or_default().insert(&user.name);
            }
        }
        let list = |names: BTreeSet<&str>, quote: &str| {
            names.into_iter().map(|name| format!("{quote}{name}{quote}")).collect::<Vec<_>>().join(", ")
        };
        let texts = places.into_iter().map(|(place, names)| match place {
            ALERTS => format!("alerts {}", list(names, "`")),
            RECORDED => list(names, "`"),
            dashboard => format!("{dashboard}: {}", list(names, "")),
        });
        texts.collect::<Vec<_>>().join("; ").replace('|', "\\|")
    }

    fn records(&self, series: &str) -> bool {
        self.0.iter().any(|user| user.place == RECORDED && user.name == series)
    }

    /// Recorded series, and which of the `known` ones and of each other they are made from.
    #[must_use]
    pub fn recorded(&self, known: &BTreeSet<String>) -> BTreeMap<&str, BTreeSet<&str>> {
        let mut recorded: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for user in self.0.iter().filter(|user| user.place == RECORDED) {
            let series = user.words.iter().filter(|word| {
                let whole = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end));
                known.contains(word.as_str())
                    || whole.is_some_and(|whole| known.contains(whole))
                    || self.records(word)
            });
            recorded.entry(&user.name).or_default().extend(series.map(String::as_str));
        }
        recorded
    }
}

/// The files of a directory with this extension, in order.
fn read(dir: &str, extension: &str) -> anyhow::Result<Vec<(String, String)>> {
    let mut paths: Vec<_> = std::fs::read_dir(root().join(dir))
        .with_context(|| format!("read {dir}"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths.sort();
    let text = |path: std::path::PathBuf| Ok((path.display().to_string(), std::fs::read_to_string(&path)?));
    paths.into_iter().map(text).collect()
}

/// Words that may be names of series. Label values are taken too; a series is looked for by its whole name.
fn words(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.filter(|word| word.len() > 3).map(str::to_owned).collect()
}

fn dashboard(text: &str, users: &mut Vec<User>) -> anyhow::Result<()> {
    let json: Value = serde_json::from_str(text)?;
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let title = text(&json, "title");
    let place = title.strip_prefix("Tier0 / ").unwrap_or(&title).to_owned();
    let list =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    for panel in list(&json, "panels") {
        let expressions: Vec<String> =
            list(&panel, "targets").iter().map(|target| text(target, "expr")).collect();
        let (place, words) = (place.clone(), words(&expressions.join(" ")));
        users.push(User { place, name: text(&panel, "title"), words });
    }
    for annotation in json.get("annotations").map(|all| list(all, "list")).unwrap_or_default() {
        let (place, words) = (place.clone(), words(&text(&annotation, "expr")));
        users.push(User { place, name: text(&annotation, "name"), words });
    }
    Ok(())
}

/// In the layout the rules are written in: a rule begins with `- alert:` or `- record:`, its texts with `annotations:`.
fn rules(text: &str, users: &mut Vec<User>) {
    let mut current: Option<(&'static str, String)> = None;
    let mut expression = String::new();
    let mut close = |current: &mut Option<(&'static str, String)>, expression: &mut String| {
        if let Some((place, name)) = current.take() {
            users.push(User { place: place.into(), name, words: words(expression) });
        }
        expression.clear();
    };
    for line in text.lines() {
        let line = line.trim();
        let begins = [("- alert: ", ALERTS), ("- record: ", RECORDED), ("- {record: ", RECORDED)]
            .into_iter()
            .find_map(|(start, place)| Some((place, line.strip_prefix(start)?)));
        if let Some((place, rest)) = begins {
            close(&mut current, &mut expression);
            let (name, inline) = rest.split_once(", expr:").unwrap_or((rest, ""));
            current = Some((place, name.trim_matches('"').into()));
            expression.push_str(inline);
        } else if line.starts_with("annotations:") || line.starts_with("- name:") {
            close(&mut current, &mut expression);
        } else if !line.starts_with('#') {
            expression.push_str(line);
            expression.push(' ');
        }
    }
    close(&mut current, &mut expression);
}
