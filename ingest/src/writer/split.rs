//! Finding the message on which the database fails, by halving the batch, and storing the others.
//!
//! It becomes one dead letter as a whole. Whatever it is, it costs its neighbours a few seconds, not for ever, and not again
//! after a restart.

use super::commit::Poisoned;
use super::{Stored, Writer};
use crate::batch::Batch;
use crate::delivery::Delivery;
use crate::trace::Tries;

/// The batch as a whole has failed several times: a part of it that fails once more is at fault. A message alone is given some more.
const TRIES_OF_SEVERAL: usize = 1;
const TRIES_OF_ONE: usize = 3;

/// Messages that are tried together.
struct Piece {
    messages: Vec<Delivery>,
    /// Why the only message is refused.
    refused: Option<String>,
}

/// What to try next, the last one first.
fn pieces(mut messages: Vec<Delivery>, poisoned: &Poisoned) -> Vec<Piece> {
    if messages.len() <= 1 {
        let error = format!("the database fails on this message and takes others: {}", poisoned.error);
        return vec![Piece { messages, refused: Some(error) }];
    }
    let later = messages.split_off(messages.len() / 2);
    vec![Piece { messages: later, refused: None }, Piece { messages, refused: None }]
}

impl<B: Batch> Writer<B> {
    /// Stores what can be stored of a batch that failed as a whole. The order of the messages is kept.
    pub(super) async fn split(&self, batch: &mut B, poisoned: &Poisoned) -> Stored {
        let messages = batch.deliveries_mut().take();
        tracing::error!(
            error = poisoned.error,
            messages = messages.len(),
            "the database fails on this batch and takes others; finding the message at fault"
        );
        self.metrics.splits.inc();
        let mut all = Stored::default();
        let mut open = pieces(messages, poisoned);
        while let Some(piece) = open.pop() {
            self.refill(batch, piece.messages);
            let tries_before_blame = match piece.refused {
                // Its parts have one letter together, which has to be stored whatever it takes.
                Some(error) => {
                    batch.refuse_whole(error);
                    TRIES_OF_ONE
                }
                None if batch.deliveries().len() == 1 => TRIES_OF_ONE,
                None => TRIES_OF_SEVERAL,
            };
            batch.seal();
            match self.commit(batch, &mut Tries::new(), tries_before_blame).await {
                Ok(committed) => all.add(self.committed(batch, committed)),
                Err(poisoned) => open.extend(pieces(batch.deliveries_mut().take(), &poisoned)),
            }
        }
        all
    }

    fn refill(&self, batch: &mut B, messages: Vec<Delivery>) {
        batch.clear();
        // Of these messages alone: what was seen lately is known to be in no table.
        let mut memory = B::memory(&self.settings);
        let now_us = self.clock.now_us();
        for delivery in messages {
            batch.push(delivery, now_us, &mut memory);
        }
    }
}
