//! Leaving for good: a member's session on the broker is emptied, then ended; nothing that was dealt to it is lost.
//!
//! A broker deals to a session for as long as it is subscribed, connected or not. So: unsubscribe; then publish a marker
//! to a topic that this session alone hears. The broker's queue for a session is first in, first out: when the marker
//! comes, everything that was dealt has come. When all of that is committed, the session is ended (expiry 0). No clock
//! decides anything. A lost connection begins again. A process that ends half-way leaves the session as it is.

use super::connection::{Connection, Incoming};
use super::error::ConnectionError;
use super::packet::Publish;
use super::reason;
use super::settings::ConsumerSettings;

/// Where a member hears its own marker. Its client id may hold what a topic must not.
pub(super) fn topic(client_id: &str) -> String {
    let mut topic = String::from("tier0/leave/");
    for letter in client_id.chars() {
        match letter {
            '%' | '/' | '+' | '#' | '$' | '\0' => topic.push_str(&format!("%{:02X}", u32::from(letter))),
            plain => topic.push(plain),
        }
    }
    topic
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unsubscribing,
    Listening,
    /// The marker is sent, then taken by the broker.
    Marked,
    Waiting,
    /// Everything the session held has been received.
    Received,
    Ended,
    /// It cannot be done; the session stays as it is.
    Failed,
    /// The broker had no session under this client id; what the connection made is ended.
    Nothing,
}

/// How far the leaving has come, over all connections of this process.
#[derive(Debug)]
pub(super) struct Farewell {
    client_id: String,
    filter: String,
    topic: String,
    /// Tells this process' markers from those of one that did not come to its end.
    marker: String,
    state: State,
    /// The broker has unsubscribed the session for this process, so that a second time finds nothing.
    asked: bool,
    problem: Option<String>,
}

impl Farewell {
    pub(super) fn new(settings: &ConsumerSettings) -> Self {
        Self {
            client_id: settings.client_id.clone(),
            filter: settings.filter.clone(),
            topic: topic(&settings.client_id),
            marker: format!("{:016x}", rand::random::<u64>()),
            state: State::Unsubscribing,
            asked: false,
            problem: None,
        }
    }

    /// On a new connection.
    pub(super) fn begin(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        if self.is_over() {
            return Ok(());
        }
        if !connection.terms().session_present {
            let problem = if self.asked {
                "has lost the session of client id"
            } else {
                "holds no session of client id"
            };
            self.fail(State::Nothing, format!("the broker {problem} {}", self.client_id));
            return Ok(());
        }
        self.state = State::Unsubscribing;
        connection.unsubscribe([self.filter.clone()])
    }

    /// What the broker sent, save what is for the writers.
    pub(super) fn take(
        &mut self,
        incoming: &Incoming,
        connection: &mut Connection,
    ) -> Result<(), ConnectionError> {
        match (self.state, incoming) {
            (State::Unsubscribing, Incoming::Unsubscribed(code)) => {
                // Anything but a success: the session may be subscribed otherwise, and is dealt to on and on.
                if *code != 0 && !self.asked {
                    self.fail(
                        State::Failed,
                        format!(
                            "the session of client id {} is not subscribed to {} (the broker: {}): mqtt_consumer.filter \
                             must be what the member ran with; after an interrupted --leave start the member once more first",
                            self.client_id, self.filter, reason::name(*code)
                        ),
                    );
                    return Ok(());
                }
                self.asked = true;
                self.state = State::Listening;
                tracing::info!(
                    filter = self.filter,
                    "unsubscribed; what the broker holds for this session comes now"
                );
                connection.subscribe(&self.topic)
            }
            (State::Listening, Incoming::Subscribed) => {
                self.state = State::Marked;
                connection.publish(&self.topic, &self.marker)
            }
            (State::Marked, Incoming::Published(code)) => {
                // "No matching subscribers" too: the marker would never come.
                if *code != 0 {
                    self.fail(
                        State::Failed,
                        format!(
                            "the broker does not take {}: {} (this client must be allowed to write and read it)",
                            self.topic, reason::name(*code)
                        ),
                    );
                } else {
                    self.state = State::Waiting;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Now and then: a broker whose queue for this session was full has dropped the marker without a word.
    pub(super) fn remind(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        if self.state != State::Waiting {
            return Ok(());
        }
        self.state = State::Marked;
        connection.publish(&self.topic, &self.marker)
    }

    /// A message on the marker's topic.
    pub(super) fn marker(&mut self, publish: &Publish) {
        if publish.payload == self.marker && !self.is_over() {
            tracing::info!("the broker holds nothing more for this session; the rest is committed now");
            self.state = State::Received;
        }
    }

    /// A reading has come. After the marker there is none, unless the session is subscribed to something else too.
    pub(super) fn reading(&mut self) {
        if self.state == State::Received {
            self.state = State::Failed;
            self.problem = Some(format!(
                "readings come after the marker: the session of client id {} has another subscription than {}, and is kept. \
                 Start the member once more: it ends a subscription that its mqtt_consumer.filter had before. Then --leave \
                 again",
                self.client_id, self.filter
            ));
        }
    }

    /// The connection has ended. Some errors will be the same next time.
    pub(super) fn lost(&mut self, error: &ConnectionError) {
        match error {
            ConnectionError::TakenOver(_) => self.fail(
                State::Failed,
                format!(
                    "another process uses client id {}: stop it before its member leaves",
                    self.client_id
                ),
            ),
            ConnectionError::StillDealt => self.reading(),
            ConnectionError::NotSubscribed(_) => self.fail(
                State::Failed,
                format!("{}: {error} (this client must be allowed to read it)", self.topic),
            ),
            _ => {}
        }
    }

    fn fail(&mut self, state: State, problem: String) {
        if !self.is_over() {
            self.state = state;
            self.problem = Some(problem);
        }
    }

    /// Nothing more is to be read.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Received | State::Ended | State::Failed | State::Nothing)
    }

    /// It cannot be done on any connection.
    pub(super) fn has_failed(&self) -> bool {
        self.state == State::Failed
    }

    /// The session is to end with the connection, once everything is committed.
    pub(super) fn ends_the_session(&self) -> bool {
        matches!(self.state, State::Received | State::Nothing)
    }

    /// The broker has ended the session.
    pub(super) fn ended(&mut self) {
        if self.state == State::Received {
            self.state = State::Ended;
        }
    }

    /// The broker has no session for this client id any more, as it should be.
    pub(super) fn has_ended_the_session(&self) -> bool {
        matches!(self.state, State::Ended | State::Nothing)
    }

    pub(super) fn outcome(self) -> anyhow::Result<()> {
        match (self.state, self.problem) {
            (State::Ended, _) => {
                if !self.filter.starts_with("$share/") {
                    tracing::warn!(
                        filter = self.filter,
                        "no session of this client id is subscribed any more: unless another consumer is, the broker acknowledges \
                         what devices publish and throws it away, until a consumer is subscribed again"
                    );
                }
                tracing::info!(
                    client_id = self.client_id,
                    "the member has left: its session is empty and ended"
                );
                Ok(())
            }
            (_, Some(problem)) => anyhow::bail!("not left: {problem}"),
            (_, None) => anyhow::bail!(
                "not left: ended before the session was empty. Nothing is lost, the broker keeps the session: start the \
                 member once more, then --leave again"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_holds_any_client_id_and_no_wildcard() {
        assert_eq!(topic("tier0-mqtt-consumer"), "tier0/leave/tier0-mqtt-consumer");
        assert_eq!(topic("a/b+#%é"), "tier0/leave/a%2Fb%2B%23%25é");
    }
}
