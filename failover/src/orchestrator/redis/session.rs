//! A session with one Redis or Sentinel for a few commands. It never reconnects: what it says must be of now.

use std::time::Duration;

use anyhow::{Context, anyhow};
use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::config::{Config, ConnectionConfig, PerformanceConfig, ServerConfig};
use fred::types::{ClusterHash, CustomCommand, Value};
use service::secret::Secret;
use tokio::time::timeout;

use crate::protocol::Upstream;

/// For the connection, for each command, and for the end.
const LIMIT: Duration = Duration::from_millis(500);

/// One command to one server.
pub(super) async fn ask(
    address: &Upstream,
    password: &Secret,
    name: &'static str,
    arguments: &[&str],
) -> anyhow::Result<Value> {
    let client = open(address, password).await?;
    let answer = command(&client, name, arguments).await;
    // Nothing is lost when it cannot say goodbye; but a session that is only dropped stays open.
    drop(timeout(LIMIT, client.quit()).await);
    answer
}

async fn open(address: &Upstream, password: &Secret) -> anyhow::Result<Client> {
    let config = Config {
        server: ServerConfig::new_centralized(&address.host, address.port),
        password: (!password.is_empty()).then(|| password.expose().to_owned()),
        fail_fast: true,
        ..Config::default()
    };
    let performance = PerformanceConfig { default_command_timeout: LIMIT, ..PerformanceConfig::default() };
    let connection = ConnectionConfig {
        connection_timeout: LIMIT,
        internal_command_timeout: LIMIT,
        max_command_attempts: 1,
        ..ConnectionConfig::default()
    };
    let client = Client::new(config, Some(performance), Some(connection), None);
    timeout(LIMIT, client.init())
        .await
        .map_err(|_| anyhow!("no session within {LIMIT:?}"))?
        .context("connect")?;
    Ok(client)
}

async fn command(client: &Client, name: &'static str, arguments: &[&str]) -> anyhow::Result<Value> {
    let command = CustomCommand::new_static(name, ClusterHash::FirstKey, false);
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    timeout(LIMIT, client.custom(command, arguments))
        .await
        .map_err(|_| anyhow!("no answer within {LIMIT:?}"))?
        .with_context(|| format!("{name} was refused"))
}
