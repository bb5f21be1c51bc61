//! The agents as hands: orders over HTTP.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use failover_api::{Node, Problem, word};
use reqwest::Client;
use service::secret::Secret;
use tokio::sync::watch as channel;

use crate::node_control::{NodeControl, OrderError};
use crate::orchestrator::crash;
use crate::orchestrator::settings::Address;
use crate::orchestrator::store::Store;
use crate::orchestrator::watch::Watched;
use crate::protocol::{Code, Command, NodeStatus, Order, millis};
use crate::state::State;

const CONNECT: Duration = Duration::from_millis(500);
/// For the answer to travel, after the agent's own limit.
const TRAVEL: Duration = Duration::from_millis(500);
/// How long after its heartbeat an agent's answer is waited for; then the connection counts as dead.
const LATE: Duration = Duration::from_millis(400);
/// An order is not waited for when its agent says nothing else either for so long.
const PEER: Duration = Duration::from_secs(2);

/// Speaks to all agents, and keeps the state.
#[derive(Debug)]
pub struct Remote {
    client: Client,
    addresses: BTreeMap<Node, Address>,
    token: Secret,
    store: Store,
    pub watched: Arc<Watched>,
    /// What is durable, for everybody who only looks.
    saved: Mutex<Option<State>>,
    /// Why the last try to make something durable failed, until one succeeds.
    unsaved: Mutex<Option<String>>,
    /// Why there is no first state yet.
    pub waiting: Mutex<String>,
    /// The last step that was made durable.
    pub passed: channel::Sender<String>,
}

impl Remote {
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new(
        addresses: BTreeMap<Node, Address>,
        token: Secret,
        store: Store,
        watched: Arc<Watched>,
    ) -> anyhow::Result<Self> {
        let client = Client::builder()
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .no_proxy()
            .build()
            .context("make the HTTP client")?;
        let passed = channel::Sender::new(String::new());
        Ok(Self {
            client,
            addresses,
            token,
            store,
            watched,
            saved: Mutex::default(),
            unsaved: Mutex::default(),
            waiting: Mutex::default(),
            passed,
        })
    }

    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The state as it was last made durable; none before the first start is through.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// State that was found on disk.
    pub fn found(&self, state: &State) {
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(state.clone());
    }

    /// Notes whether something could be made durable.
    pub fn note_saved(&self, error: Option<String>) {
        *self.unsaved.lock().unwrap_or_else(PoisonError::into_inner) = error;
    }

    /// What a person must know of this process itself.
    #[must_use]
    pub fn alarm(&self) -> Option<String> {
        let unsaved = self.unsaved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        unsaved.map(|error| {
            format!(
                "the orchestrator cannot write its directory {} and does nothing until it can: {error}",
                self.store.dir().display()
            )
        })
    }

    /// The status of a node when it is newer than `after`, or after `wait`.
    ///
    /// # Errors
    /// When the agent does not answer in time.
    pub async fn status(&self, node: &str, after: u64, wait: Duration) -> Result<NodeStatus, OrderError> {
        let path = format!("/v1/status?after={after}&wait_ms={}", millis(wait));
        let request = self.client.get(self.url(node, &path)?).timeout(wait + LATE);
        self.answer(node, request).await
    }

    fn url(&self, node: &str, path: &str) -> Result<String, OrderError> {
        match self.addresses.get(node) {
            Some(address) => Ok(format!("http://{}{path}", address.agent)),
            None => Err(OrderError::Refused {
                node: node.into(),
                code: Code::Unknown,
                message: "not among the configured nodes".into(),
            }),
        }
    }

    async fn answer(&self, node: &str, request: reqwest::RequestBuilder) -> Result<NodeStatus, OrderError> {
        let outcome = self.ask(node, request.bearer_auth(self.token.expose())).await;
        match &outcome {
            Ok(status) => self.watched.heard(status.clone()),
            Err(error) => self.watched.unheard(error),
        }
        outcome
    }

    async fn ask(&self, node: &str, request: reqwest::RequestBuilder) -> Result<NodeStatus, OrderError> {
        let silent = |error: reqwest::Error| {
            if is_refused(&error) {
                OrderError::Gone(node.into())
            } else {
                OrderError::Silent { node: node.into(), reason: full(&error) }
            }
        };
        let response = request.send().await.map_err(silent)?;
        if response.status().is_success() {
            return response.json().await.map_err(silent);
        }
        let status = response.status();
        let problem: Problem = match response.json().await {
            Ok(problem) => problem,
            Err(_) => Problem::new(&word(&Code::Failed), format!("the agent answered {status}")),
        };
        let code = serde_json::from_value(problem.error.code.into()).unwrap_or(Code::Unknown);
        let message = problem.error.message;
        Err(OrderError::Refused { node: node.into(), code, message })
    }
}

/// Nobody listens there: the machine answers, the process is gone.
fn is_refused(error: &reqwest::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::ConnectionRefused;
        }
        source = inner.source();
    }
    false
}

fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

impl NodeControl for Remote {
    async fn order(
        &self,
        node: &str,
        epoch: u64,
        order: Order,
        limit: Duration,
    ) -> Result<NodeStatus, OrderError> {
        let (orchestrator, displaces) =
            self.state().map(|state| (state.id, state.displaced)).unwrap_or_default();
        let command = Command { orchestrator, displaces, epoch, limit_ms: millis(limit), what: order };
        let request = self.client.post(self.url(node, "/v1/orders")?).timeout(limit + TRAVEL).json(&command);
        tokio::select! {
            answer = self.answer(node, request) => answer,
            () = self.watched.silent(node, PEER) => {
                let reason = format!("nothing was heard of it for {PEER:?}");
                Err(OrderError::Silent { node: node.into(), reason })
            }
        }
    }

    fn save(&self, state: &State) -> anyhow::Result<()> {
        self.store.save(state)?;
        self.found(state);
        Ok(())
    }

    fn passed(&self, step: &str) {
        crash::after(step);
        self.passed.send_replace(step.to_owned());
    }
}
