//! Requests and queries of the pages, asked in a living system.

use std::time::Duration;

use playground::cluster::Cluster;
use playground::http;
use playground::postgres::Role;
use serde_json::Value;
use tokio::time::{Instant, sleep};

const LIMIT: Duration = Duration::from_secs(120);

pub(crate) enum What {
    Http { post: bool, port: u16, path: String, body: String, keys: Vec<String> },
    Sql { node: String, sql: String },
}

pub(crate) struct Ask {
    what: What,
    place: String,
}

impl Ask {
    pub(super) fn new(what: What) -> Self {
        Self { what, place: String::new() }
    }

    pub(super) fn at(mut self, page: &str, line: usize) -> Self {
        self.place = format!("{page}:{line}");
        self
    }
}

/// Asks everything. `ports` gives for a port of the contract the one that is used here.
pub(crate) async fn ask(asks: &[Ask], cluster: &Cluster, token: &str, ports: impl Fn(u16) -> Option<u16>) {
    let mut problems = Vec::new();
    // What changes something comes last: a switchover stops a node that others ask.
    let changes = |ask: &&Ask| matches!(ask.what, What::Http { post: true, .. });
    for ask in asks.iter().filter(|ask| !changes(ask)).chain(asks.iter().filter(changes)) {
        let outcome = match &ask.what {
            What::Http { post, port, path, body, keys } => match ports(*port) {
                Some(port) => request(*post, port, path, body, keys, token).await,
                None => Err(format!("nobody serves port {port}")),
            },
            What::Sql { node, sql } => prepare(cluster, node, sql).await,
        };
        problems.extend(outcome.err().map(|problem| format!("{}: {problem}", ask.place)));
    }
    assert!(problems.is_empty(), "{} problems:\n  {}", problems.len(), problems.join("\n  "));
}

async fn request(
    post: bool,
    port: u16,
    path: &str,
    body: &str,
    keys: &[String],
    token: &str,
) -> Result<(), String> {
    let deadline = Instant::now() + LIMIT;
    let (status, answer) = loop {
        let answer = match post {
            true => http::post(port, path, token, body, LIMIT).await,
            false => http::get_within(port, path, LIMIT).await,
        };
        match answer {
            // Not ready is a state of the moment.
            Ok((503, _)) if !post && Instant::now() < deadline => sleep(Duration::from_millis(100)).await,
            answer => break answer.map_err(|error| format!("{error:#}"))?,
        }
    };
    // A refusal of what cannot be done now is an answer too.
    if !matches!((post, status), (_, 200) | (true, 409 | 412 | 503)) {
        return Err(format!("{path}: {status}: {answer}"));
    }
    if keys.is_empty() {
        return Ok(());
    }
    let json: Value = serde_json::from_str(&answer).map_err(|error| format!("{path}: {error}"))?;
    match keys.iter().find(|key| json.get(key.as_str()).is_none()) {
        Some(key) => Err(format!("{path} has no {key}: {answer}")),
        None => Ok(()),
    }
}

/// Parsed and analysed by the server, not carried out.
async fn prepare(cluster: &Cluster, node: &str, sql: &str) -> Result<(), String> {
    let node = match node {
        "primary" => cluster.primary(),
        "standby" => cluster.standby(),
        name => cluster.nodes.iter().find(|node| node.name() == name).ok_or("no such node")?,
    };
    let db = node.connect(Role::Admin).await.map_err(|error| format!("{error:#}"))?;
    // Places a person fills in, and a COPY, which cannot be prepared: its query can.
    let sql = sql.replace("'FROM'", "'2026-01-01'").replace("'TO'", "'2026-01-02'").replace("(PID)", "(1)");
    let inner = sql
        .strip_prefix("COPY (")
        .and_then(|rest| rest.split_once(") TO STDOUT"))
        .map(|(inner, _)| inner.to_owned());
    let sql = inner.unwrap_or(sql);
    db.prepare(&sql)
        .await
        .map(drop)
        .map_err(|error| format!("{error}: {}: {sql}", error.as_db_error().map_or("", |db| db.message())))
}
