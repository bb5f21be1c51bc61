//! The letters of parts that the database refused: known only when the message has been decoded, and found anew with each try.

use super::{Deliveries, LETTERS_PER_MESSAGE, as_a_whole};
use crate::dead_letter::{DeadLetter, Reason};
use crate::letter_limit::Origin;
use crate::reading::elements_at;

/// A part of a message that the database refused.
#[derive(Debug)]
pub(crate) struct RefusedPart<'e> {
    /// The number of its message.
    pub(crate) message: usize,
    /// Its place in the message's array.
    pub(crate) element: u32,
    pub(crate) reason: Reason,
    pub(crate) error: &'e str,
}

/// Parts that were refused at the database, and their letters.
#[derive(Debug, Default)]
pub(crate) struct RefusedParts {
    /// By the number of their message.
    pub(super) parts: Vec<(usize, Reason)>,
    pub(super) letters: Vec<DeadLetter>,
    /// Parts without a letter, since their device had too many.
    pub(super) suppressed: usize,
}

impl Deliveries {
    /// The letters of elements that the database refused. They count when they are committed: [`Deliveries::refused_at_database`].
    pub(crate) fn letters_of_elements(&mut self, mut refused: Vec<RefusedPart<'_>>) -> RefusedParts {
        refused.sort_unstable_by_key(|part| (part.message, part.element));
        let mut all = RefusedParts::default();
        for parts in refused.chunk_by(|a, b| a.message == b.message) {
            self.add_elements(&mut all, parts);
        }
        all
    }

    /// As [`Deliveries::letters_of_elements`]; each message has one letter as a whole.
    pub(crate) fn letters_of_messages(&mut self, mut refused: Vec<RefusedPart<'_>>) -> RefusedParts {
        refused.sort_by_key(|part| part.message);
        let mut all = RefusedParts::default();
        for parts in refused.chunk_by(|a, b| a.message == b.message) {
            all.parts.extend(parts.iter().map(|part| (part.message, part.reason)));
            if let Some(first) = parts.first() {
                self.add_whole(&mut all, first, first.error, parts.len());
            }
        }
        all
    }

    /// Elements of one message, in their order. Its payload is walked once, and no further than to the last one with a letter
    /// of its own.
    fn add_elements(&mut self, all: &mut RefusedParts, parts: &[RefusedPart<'_>]) {
        all.parts.extend(parts.iter().map(|part| (part.message, part.reason)));
        let Some(delivery) = parts.first().and_then(|first| self.messages.get(first.message)) else { return };
        let payload = delivery.payload.clone();
        let before = delivery.admissions.as_ref().map_or(0, |admissions| admissions.parts);
        let (single, rest) = parts.split_at(LETTERS_PER_MESSAGE.saturating_sub(before).min(parts.len()));
        let texts = elements_at(&payload, single.iter().map(|part| part.element));
        for (part, text) in single.iter().zip(texts) {
            self.add(all, part, text, part.error, 1);
        }
        if let Some(next) = rest.first() {
            self.add_whole(all, next, &as_a_whole(next.error), rest.len());
        }
    }

    /// One letter of the whole message for so many of its parts.
    fn add_whole(&mut self, all: &mut RefusedParts, part: &RefusedPart<'_>, error: &str, parts: usize) {
        let Some(delivery) = self.messages.get(part.message) else { return };
        // The decoder has refused so much of it that there is one already.
        if delivery.admissions.as_ref().is_some_and(|admissions| admissions.whole) {
            return;
        }
        let payload = delivery.payload.clone();
        self.add(all, part, &payload, error, parts);
    }

    fn add(
        &mut self,
        all: &mut RefusedParts,
        RefusedPart { message, reason, .. }: &RefusedPart<'_>,
        text: &[u8],
        error: &str,
        parts: usize,
    ) {
        let Some(delivery) = self.messages.get(*message) else { return };
        let received_at_us = self.time_of(delivery.received);
        let letter = self.new_letter(delivery, text, *reason, error, received_at_us);
        let place = super::place_of(&delivery.payload, text);
        let Self { messages, limit, .. } = self;
        let (Some(limit), Some(delivery)) = (limit, messages.get_mut(*message)) else {
            return all.letters.push(letter);
        };
        let admit = || limit.admit(Origin::Reading, &letter.topic, letter.weight());
        if delivery.admissions.get_or_insert_default().decide(Origin::Reading, place, admit) {
            all.letters.push(letter);
        } else {
            all.suppressed += parts;
        }
    }

    /// The only message is refused as a whole, and with it its `parts` parts. They have one letter together.
    pub(crate) fn refuse_whole(&mut self, parts: usize, error: &str) {
        let messages = self.take();
        let Some(delivery) = messages.into_iter().next() else { return };
        self.push(delivery);
        let (message, reason) = (0, Reason::RejectedByDatabase);
        let whole = RefusedPart { message, element: 0, reason, error };
        let mut refused = RefusedParts::default();
        self.add_whole(&mut refused, &whole, error, 1);
        refused.parts = vec![(message, reason); parts.max(1)];
        self.refused_at_database(refused);
    }

    /// These parts are committed as dead letters.
    pub(crate) fn refused_at_database(&mut self, refused: RefusedParts) {
        self.rejected.extend(refused.parts);
        self.letters.extend(refused.letters);
        self.suppressed += refused.suppressed;
    }
}
