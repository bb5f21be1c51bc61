//! What is known of a batch that was filled.

use tokio::time::Instant;

use crate::writer::ClosedBy;

/// How a batch was filled.
#[derive(Debug)]
pub(crate) struct Filled {
    pub(super) ticket: u64,
    pub(crate) closed_by: ClosedBy,
    /// When its oldest message was received, and when that was taken from the queue.
    pub(crate) oldest: Instant,
    pub(crate) begun: Instant,
}
