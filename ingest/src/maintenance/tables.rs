//! Looks at the tables while rows are written. A DBA can change them so that a commit succeeds and its rows are lost, or stored
//! twice, later: no statement of ours would ever fail.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::batch::committed::in_time;
use crate::database::Database;
use crate::failure::WriteError;
use crate::schema::{self, Purpose};

/// As long as rows may go into such a table before it is noticed.
const PERIOD: Duration = Duration::from_secs(5);

/// For ever.
pub(super) async fn watch(database: &Database, purpose: Purpose) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        look(database, purpose).await;
    }
}

async fn look(database: &Database, purpose: Purpose) {
    let Ok(client) = database.client().await else { return };
    match in_time(database.commit_timeout(), schema::are_ours(&client, purpose)).await {
        Ok(()) => database.set_fault(None),
        Err(WriteError::Schema(fault)) => database.set_fault(Some(fault)),
        // What was known stays so.
        Err(error) => database.discard(client, &error.to_string()),
    }
}
