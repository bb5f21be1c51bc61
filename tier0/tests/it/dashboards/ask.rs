//! Asking Prometheus and Postgres as Grafana does.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, bail};
use playground::http;
use playground::postgres::Db;
use serde_json::Value;
use tokio_postgres::SimpleQueryMessage;

/// Prometheus shares the machine with everything that it looks at.
const ANSWER: Duration = Duration::from_secs(60);

pub(super) struct Prometheus {
    pub(super) port: u16,
}

/// A recording rule or an alert.
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) query: String,
    pub(super) health: String,
    pub(super) error: String,
    pub(super) state: String,
    pub(super) critical: bool,
}

impl Prometheus {
    async fn get(&self, path: &str, parameters: &[(&str, &str)]) -> anyhow::Result<Value> {
        let parameters: Vec<String> =
            parameters.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
        let (status, body) =
            http::get_within(self.port, &format!("/api/v1/{path}?{}", parameters.join("&")), ANSWER).await?;
        let mut answer: Value = serde_json::from_str(&body).with_context(|| format!("{status}: {body}"))?;
        if status != 200 || answer["status"] != "success" {
            bail!("{status}: {}", answer["error"]);
        }
        Ok(answer["data"].take())
    }

    /// Whether there is a number to show.
    pub(super) async fn shows(&self, query: &str, instant: bool) -> anyhow::Result<bool> {
        let now = jiff::Timestamp::now().as_second();
        let data = if instant {
            self.get("query", &[("query", query)]).await?
        } else {
            let (start, end) = ((now - 300).to_string(), now.to_string());
            self.get("query_range", &[("query", query), ("start", &start), ("end", &end), ("step", "5")])
                .await?
        };
        let series = data["result"].as_array().context("a list of series")?;
        let is_number = |sample: &Value| sample[1].as_str().is_some_and(|text| text != "NaN");
        Ok(series.iter().any(|series| {
            is_number(&series["value"]) || series["values"].as_array().into_iter().flatten().any(is_number)
        }))
    }

    /// The labels of what a query finds now, for messages.
    pub(super) async fn labels(&self, query: &str) -> anyhow::Result<String> {
        let data = self.get("query", &[("query", query)]).await?;
        let series = data["result"].as_array().into_iter().flatten();
        Ok(series.map(|series| series["metric"].to_string()).collect::<Vec<_>>().join(", "))
    }

    /// The values of a label.
    pub(super) async fn values(&self, metric: &str, label: &str) -> anyhow::Result<Vec<String>> {
        let data = self.get(&format!("label/{label}/values"), &[("match[]", metric)]).await?;
        Ok(data.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect())
    }

    /// Everything that is exported or recorded.
    pub(super) async fn names(&self) -> anyhow::Result<BTreeSet<String>> {
        let data = self.get("label/__name__/values", &[]).await?;
        Ok(data.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect())
    }

    pub(super) async fn rules(&self) -> anyhow::Result<Vec<Rule>> {
        let data = self.get("rules", &[]).await?;
        let groups = data["groups"].as_array().context("groups")?;
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(rules
            .map(|rule| Rule {
                name: text(&rule["name"]),
                query: text(&rule["query"]),
                health: text(&rule["health"]),
                error: text(&rule["lastError"]),
                state: text(&rule["state"]),
                critical: rule["labels"]["severity"] == "critical",
            })
            .collect())
    }
}

/// The series an expression reads: words that are no function, no keyword, no label and no text.
pub(super) fn series(query: &str) -> BTreeSet<String> {
    const KEYWORDS: [&str; 13] = [
        "and",
        "or",
        "unless",
        "bool",
        "offset",
        "by",
        "on",
        "without",
        "ignoring",
        "group_left",
        "group_right",
        "inf",
        "nan",
    ];
    let mut found = BTreeSet::new();
    let mut rest = query;
    while let Some(at) =
        rest.find(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '{' || c == '[' || c == '"')
    {
        let (head, tail) = rest.split_at(at);
        // The unit of a number, as in 5m or 1e6.
        let in_number = head.ends_with(|c: char| c.is_ascii_digit());
        match tail.as_bytes()[0] {
            open @ (b'{' | b'[' | b'"') => {
                let close = match open {
                    b'{' => '}',
                    b'[' => ']',
                    _ => '"',
                };
                let end = tail[1..].find(close).map_or(tail.len(), |end| end + 2);
                rest = &tail[end..];
            }
            _ => {
                let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
                let end = tail.find(|c| !is_word(c)).unwrap_or(tail.len());
                let word = &tail[..end];
                rest = &tail[end..];
                let after = rest.trim_start();
                if KEYWORDS.contains(&word.to_lowercase().as_str()) {
                    // Its list of labels.
                    if matches!(word, "by" | "on" | "without" | "ignoring" | "group_left" | "group_right")
                        && after.starts_with('(')
                    {
                        rest = &after[after.find(')').map_or(after.len(), |end| end + 1)..];
                    }
                } else if !in_number && !is_function(after) {
                    found.insert(word.to_owned());
                }
            }
        }
    }
    found
}

/// Also of an aggregation: `sum by (job) (..)`.
fn is_function(after: &str) -> bool {
    after.starts_with('(') || after.starts_with("by ") || after.starts_with("without ")
}

#[test]
fn finds_the_series_of_an_expression() {
    let cases: [(&str, &[&str]); 5] = [
        ("up == 0", &["up"]),
        ("1 - sum by (job) (rate(a_bucket{le=\"1\"}[5m])) / sum(rate(b[1h] offset 15m))", &["a_bucket", "b"]),
        (
            "(x > 1e6 and on (site_id) y{z=~\"w\"} < bool 5) or absent(job:v:ratio_5m)",
            &["x", "y", "job:v:ratio_5m"],
        ),
        ("{__name__=~\"a|b\"} == 0", &[]),
        ("time() - max(t > 0) > 900", &["t"]),
    ];
    for (query, expected) in cases {
        let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(series(query), expected, "{query}");
    }
}

fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

pub(super) struct Postgres {
    pub(super) db: Db,
}

impl Postgres {
    /// Whether there is a row.
    pub(super) async fn shows(&self, sql: &str) -> anyhow::Result<bool> {
        let answer = self.db.simple_query(sql).await.context("ask Postgres")?;
        Ok(answer.iter().any(|message| matches!(message, SimpleQueryMessage::Row(_))))
    }
}
