//! Why something is refused.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of an agent's refusal or failure.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    pub error: ProblemBody,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ProblemBody {
    pub code: String,
    /// What is wrong and what to do.
    pub message: String,
    #[serde(default)]
    pub details: serde_json::Value,
}

impl Problem {
    #[must_use]
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            error: ProblemBody {
                code: code.into(),
                message: message.into(),
                details: serde_json::Value::Null,
            },
        }
    }
}
