//! What an operation needs of the world. The real cluster implements it over HTTP, the property tests simulate it.

use std::future::Future;
use std::time::Duration;

use failover_api::Node;

use crate::protocol::{Code, NodeStatus, Order};
use crate::state::State;

/// Why an order was not carried out.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OrderError {
    /// Nobody listens there: the agent is gone.
    #[error("the agent of {0} is not there (connection refused)")]
    Gone(Node),
    /// No answer: it may have been carried out, or still will be.
    #[error("the agent of {node} did not answer: {reason}")]
    Silent { node: Node, reason: String },
    /// The agent answered that it did not.
    #[error("{node}: {message}")]
    Refused { node: Node, code: Code, message: String },
}

/// Orders to nodes, and the one place where state survives.
pub trait NodeControl: Send + Sync {
    /// Carries out one order within `limit` and answers with the node's status after it.
    fn order(
        &self,
        node: &str,
        epoch: u64,
        order: Order,
        limit: Duration,
    ) -> impl Future<Output = Result<NodeStatus, OrderError>> + Send;

    /// Makes `state` durable; returns when it would survive a power failure.
    ///
    /// # Errors
    /// When it cannot be written; nothing may be done then that relies on it.
    fn save(&self, state: &State) -> anyhow::Result<()>;

    /// Called after each step, when what it needs to be durable is. Tests end the process here.
    fn passed(&self, step: &str);
}
