//! Asks the primary for its time every second, and says when the clocks disagree.

use std::time::Duration;

use service::health::Dependency;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Clock, Look, State};
use crate::database::Database;
use crate::failure::WriteError;
use crate::metrics::Metrics;

const PERIOD: Duration = Duration::from_secs(1);
/// Between two log lines about the same disagreement.
const REMIND: Duration = Duration::from_secs(60);

/// One per process.
#[derive(Debug)]
pub struct Watch {
    pub clock: Clock,
    pub database: Database,
    pub metrics: Metrics,
    pub health: Dependency,
}

impl Watch {
    /// Runs until shutdown.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut said: Option<(State, Instant)> = None;
        loop {
            let patience = self.database.commit_timeout();
            tokio::select! {
                measured = timeout(patience, self.measure()) => match measured {
                    Ok(Ok(look)) => self.tell(&look, &mut said),
                    // Without an answer the clocks go on as they were; the database's own health says what is wrong.
                    Ok(Err(error)) => tracing::debug!(%error, "the primary's time is not known now"),
                    Err(_) => tracing::debug!("no answer to a question for the primary's time"),
                },
                () = shutdown.cancelled() => return,
            }
            tokio::select! {
                () = sleep(PERIOD) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    async fn measure(&self) -> Result<Look, WriteError> {
        let client = self.database.client().await?;
        self.clock.measure(&client).await
    }

    fn tell(&self, look: &Look, said: &mut Option<(State, Instant)>) {
        let Some(primary_us) = look.primary_us else { return };
        let seconds = (look.own_us - primary_us) as f64 / 1e6;
        self.metrics.clock_offset.set(seconds);
        self.metrics.clock_uncertain.set(i64::from(look.state != State::Agreed));
        let due = said.is_none_or(|(state, at)| state != look.state || at.elapsed() >= REMIND);
        let before = said.map(|(state, _)| state);
        if !due {
            return;
        }
        *said = Some((look.state, Instant::now()));
        let (own, primary) = (text(look.own_us), text(primary_us));
        match look.state {
            State::Apart => {
                self.health.down(format!(
                    "the clocks are {:.1} s apart: this machine's says {own}, the primary's {primary}",
                    seconds.abs()
                ));
                tracing::error!(
                    %own, %primary, offset_seconds = seconds,
                    "the clock of this machine and that of the primary are apart: nothing is dropped, and readings are accepted \
                     that either clock accepts, until one of them is set right"
                );
            }
            State::Doubted => {
                self.health.up();
                let possible: Vec<String> = self.clock.possible_us().into_iter().map(text).collect();
                tracing::error!(
                    %own, %primary, ?possible,
                    "the clocks have jumped, or no reading was stored for long: nothing is refused that was accepted before, \
                     until live readings agree with the clocks"
                );
            }
            State::Agreed => {
                self.health.up();
                if before.is_some_and(|before| before != State::Agreed) {
                    tracing::info!(%own, %primary, "the clocks agree again");
                }
            }
            State::Unknown => {}
        }
    }
}

fn text(us: i64) -> String {
    jiff::Timestamp::from_microsecond(us)
        .map_or_else(|_| format!("{us} us since 1970"), |time| time.to_string())
}
