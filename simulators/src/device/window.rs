//! Messages that wait for their PUBACK, by packet id. The broker may answer out of order.

use std::collections::VecDeque;

use super::message::Message;

/// Packet ids go round from 1 to this.
const IDS: u32 = 65_535;

/// Packet ids are handed out in turn; the oldest one without an answer is the front.
#[derive(Debug, Default)]
pub struct Window {
    /// Ids handed out before the front, modulo [`IDS`].
    base: u32,
    slots: VecDeque<Option<Message>>,
}

impl Window {
    /// Ids in use from the oldest without an answer to the newest: what the window's bound is about.
    #[must_use]
    pub fn span(&self) -> usize {
        self.slots.len()
    }

    /// Takes a message in and gives it its packet id. The caller keeps [`Window::span`] below 65,535.
    pub fn push(&mut self, message: Message) -> u16 {
        let id = (self.base + u32::try_from(self.slots.len()).unwrap_or(0)) % IDS + 1;
        self.slots.push_back(Some(message));
        u16::try_from(id).unwrap_or(1)
    }

    /// The message this id was given to, if it still waits.
    pub fn take(&mut self, packet_id: u16) -> Option<Message> {
        let at = (u32::from(packet_id) + IDS - 1 - self.base) % IDS;
        let message = self.slots.get_mut(at as usize)?.take()?;
        while self.slots.pop_front_if(|slot| slot.is_none()).is_some() {
            self.base = (self.base + 1) % IDS;
        }
        Some(message)
    }

    /// The one that waits longest.
    #[must_use]
    pub fn oldest(&self) -> Option<&Message> {
        self.slots.front().and_then(Option::as_ref)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Message> {
        self.slots.iter().flatten()
    }

    /// Empties the window, oldest first, and starts at packet id 1: the connection is over.
    pub fn drain(&mut self) -> impl Iterator<Item = Message> {
        self.base = 0;
        self.slots.drain(..).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::trouble::Flaw;

    fn message(sequence: u64) -> Message {
        Message {
            device: 0,
            sequence,
            first_us: 0,
            spacing_us: 0,
            readings: 1,
            flaw: Flaw::None,
            repeat: false,
            uncertain: false,
            sent_us: 0,
        }
    }

    #[test]
    fn ids_go_round_and_find_their_message_in_any_order() {
        let mut window = Window::default();
        let mut sequence = 0;
        for _ in 0..3000 {
            let ids: Vec<(u16, u64)> = (0..100)
                .map(|_| {
                    sequence += 1;
                    (window.push(message(sequence)), sequence)
                })
                .collect();
            assert!(ids.iter().all(|(id, _)| *id > 0));
            for (id, sequence) in ids.iter().skip(1).step_by(2).chain(ids.iter().step_by(2)) {
                assert_eq!(window.take(*id).unwrap().sequence, *sequence);
                assert_eq!(window.take(*id), None, "answered once");
            }
            assert_eq!(window.span(), 0);
        }
    }

    #[test]
    fn an_unanswered_one_holds_the_window_and_draining_starts_over() {
        let mut window = Window::default();
        let ids: Vec<u16> = (0..5).map(|sequence| window.push(message(sequence))).collect();
        assert_eq!(ids, [1, 2, 3, 4, 5]);
        window.take(3).unwrap();
        window.take(1).unwrap();
        assert_eq!(window.span(), 4);
        assert_eq!(window.oldest().unwrap().sequence, 1);
        assert_eq!(window.take(9), None);
        assert_eq!(window.drain().map(|m| m.sequence).collect::<Vec<_>>(), [1, 3, 4]);
        assert_eq!(window.push(message(9)), 1);
    }
}
