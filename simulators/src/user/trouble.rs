//! Deliberate trouble: messages that are late, repeated or malformed. Drawn by seed and message number.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::seeds::{join, mix, unit};

/// Injected faults. Rates are fractions of all messages, from 0 to 1, together at most 1.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TroubleSettings {
    /// Valid, but published after later events.
    pub out_of_order: f64,
    /// Valid, published twice.
    pub duplicate: f64,
    /// Truncated in the middle.
    pub not_json: f64,
    /// The session or site is missing.
    pub missing_field: f64,
    /// The status is unknown.
    pub wrong_type: f64,
    /// A time far ahead of the clock.
    pub far_future: f64,
}

/// What happens to one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    OutOfOrder,
    Duplicate,
    NotJson,
    MissingField,
    WrongType,
    FarFuture,
}

impl Trouble {
    /// The reason of the dead letter it becomes.
    #[must_use]
    pub fn reason(self) -> Option<&'static str> {
        match self {
            Self::None | Self::OutOfOrder | Self::Duplicate => None,
            Self::NotJson => Some("not_json"),
            Self::MissingField => Some("missing_field"),
            Self::WrongType => Some("wrong_type"),
            Self::FarFuture => Some("timestamp_out_of_range"),
        }
    }
}

impl TroubleSettings {
    fn rates(&self) -> [(f64, Trouble); 6] {
        [
            (self.out_of_order, Trouble::OutOfOrder),
            (self.duplicate, Trouble::Duplicate),
            (self.not_json, Trouble::NotJson),
            (self.missing_field, Trouble::MissingField),
            (self.wrong_type, Trouble::WrongType),
            (self.far_future, Trouble::FarFuture),
        ]
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let rates = self.rates();
        if rates.iter().any(|(rate, _)| !(0.0..=1.0).contains(rate)) {
            return Err(": every rate must be 0 to 1".into());
        }
        if rates.iter().map(|(rate, _)| rate).sum::<f64>() > 1.0 {
            return Err(": all rates together must be at most 1".into());
        }
        Ok(())
    }

    /// What happens to message `number` of the run.
    #[must_use]
    pub fn draw(&self, seed: u64, number: u64) -> Trouble {
        let mut at = f64::from(unit(join(mix(seed ^ 0x7472_6f75_626c_6521), number)));
        for (rate, trouble) in self.rates() {
            if at < rate {
                return trouble;
            }
            at -= rate;
        }
        Trouble::None
    }
}
