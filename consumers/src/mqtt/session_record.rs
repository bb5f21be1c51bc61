//! Keeps the database's record of the session up to date, beside the source: a reading never waits for it.

use std::sync::Arc;
use std::time::Duration;

use ingest::database::Database;
use ingest::mqtt_sessions::{self, Key, Known};
use service::backoff::Backoff;
use service::secret::Secret;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use wire::mqtt::MqttSettings;

use super::session_memory::{SessionMemory, State};
use super::settings::ConsumerSettings;

/// How exactly `last_seen` tells when readings began to be lost.
const PERIOD: Duration = Duration::from_secs(60);
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The last word, when the process ends.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// The record of one client id at one broker.
#[derive(Debug, Clone)]
pub struct SessionRecord {
    database: Database,
    key: Key,
    filter: String,
    /// Tells this process from others with the same client id.
    holder: String,
    memory: Arc<SessionMemory>,
}

impl SessionRecord {
    #[must_use]
    pub fn new(
        database: Database,
        broker: &MqttSettings<Secret>,
        settings: &ConsumerSettings,
        memory: Arc<SessionMemory>,
    ) -> Self {
        let key =
            Key { client_id: settings.client_id.clone(), broker: format!("{}:{}", broker.host, broker.port) };
        let holder = format!("{:016x}", rand::random::<u64>());
        Self { database, key, filter: settings.filter.clone(), holder, memory }
    }

    /// Tells the source what the record says; returns when a session was last lost. Where the record cannot be read the
    /// source starts without it: readings that wait matter more.
    pub async fn recall(&self) -> Option<jiff::Timestamp> {
        let known = match mqtt_sessions::load(&self.database, &self.key).await {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(
                    %error,
                    "table mqtt_sessions cannot be read: if the broker has lost the session before now, this goes unnoticed"
                );
                Known::default()
            }
        };
        if let (None, Some(broker)) = (&known.session, known.elsewhere.first()) {
            tracing::warn!(
                client_id = self.key.client_id,
                broker,
                "this client id has a session at another broker: readings may wait there. Take them with mqtt-consumer \
                 --leave and mqtt.host, mqtt.port of that broker"
            );
        }
        for (client_id, last_seen) in &known.left {
            tracing::warn!(
                client_id,
                %last_seen,
                "the broker has a session for another client id that no consumer uses any more: readings wait in it, and more may \
                 come. Start a consumer with it again, or take them out with mqtt-consumer --leave and that \
                 mqtt_consumer.client_id"
            );
        }
        if let Some(session) = known.session.as_ref().filter(|session| session.filter != self.filter) {
            tracing::info!(
                before = session.filter,
                now = self.filter,
                "mqtt_consumer.filter has changed: the subscription to the old one is ended when the new one holds"
            );
            self.memory.recall_filter(session.filter.clone());
        }
        let session = known.session?;
        self.memory.recall(session.last_seen);
        session.lost_at
    }

    /// Writes what the source finds, until shutdown.
    pub async fn keep(self, shutdown: CancellationToken) {
        let mut state = self.memory.watch();
        let mut has_held = false;
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        loop {
            let now = *state.borrow_and_update();
            let written = tokio::select! {
                written = self.write(now) => written,
                () = shutdown.cancelled() => return,
            };
            let wait = match written {
                Ok(before) => {
                    // Not at the first time: then it is the process before this one.
                    if has_held && before.as_ref().is_some_and(|before| *before != self.holder) {
                        self.memory.found_rival();
                    }
                    has_held |= now.subscribed;
                    backoff.reset();
                    PERIOD
                }
                Err(error) => {
                    let wait = backoff.next(rand::random());
                    tracing::warn!(%error, again_in = ?wait, "table mqtt_sessions cannot be written");
                    wait
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                // A change is written at once, save after a failure.
                changed = state.changed(), if wait == PERIOD => if changed.is_err() { return },
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// The last word of a process whose session may have been ended on purpose.
    pub async fn close(&self) {
        let state = *self.memory.watch().borrow();
        match timeout(LAST_WAIT, self.write(State { subscribed: false, ..state })).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "table mqtt_sessions cannot be written"),
            Err(_) => tracing::warn!("table mqtt_sessions cannot be written within {LAST_WAIT:?}"),
        }
    }

    /// Returns the process that held the session before, if this one does now.
    async fn write(&self, state: State) -> anyhow::Result<Option<String>> {
        if state.ended {
            mqtt_sessions::end(&self.database, &self.key).await?;
            return Ok(None);
        }
        if state.subscribed {
            // Until the broker has ended a former subscription, the next process must know of it.
            let old = self.memory.old_filter();
            let filter = old.as_ref().unwrap_or(&self.filter);
            return Ok(
                mqtt_sessions::save(&self.database, &self.key, filter, &self.holder, state.lost_at).await?
            );
        }
        if let Some(at) = state.lost_at {
            // It may never be subscribed: a broker that was replaced may know the filter's rights no more.
            mqtt_sessions::note_loss(&self.database, &self.key, at).await?;
        }
        Ok(None)
    }
}
