//! What one connection's devices have had acknowledged: the connection's part of the ledger.
//!
//! A reading enters its device's tally when a message that carries it is accepted for the first time, and never
//! otherwise. It also deals out new messages, since a device's last timestamp is what makes the next one distinct.

use std::collections::VecDeque;
use std::time::Duration;

use wire::ledger::Tally;

use super::message::{Message, micros};
use super::settings::FleetSettings;
use super::trouble::{FLAWS, Flaw, REASONS, Table};

/// Repeats that wait for their time, per connection. Beyond this no further ones are planned.
const MAX_WAITING_REPEATS: usize = 1 << 16;

#[derive(Debug, Clone, Default)]
struct Row {
    /// Plain timestamp of the newest reading made, microseconds; even.
    last_us: i64,
    sequence: u64,
    tally: Tally,
}

/// The books of the devices `first`, `first + stride`, ...
#[derive(Debug)]
pub struct Account {
    first: u32,
    stride: u32,
    rows: Vec<Row>,
    /// Whose turn is next.
    turn: usize,
    seed: u64,
    readings: u16,
    spacing_us: u32,
    late_us: i64,
    repeat_after: Duration,
    flaws: Table,
    waiting: VecDeque<(Duration, Message)>,
    totals: Totals,
    /// Good readings refused now, whose earlier attempt was never answered.
    unknown: Vec<(u32, i64)>,
}

/// Sums over a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Messages accepted by the broker, of every kind.
    pub acknowledged: u64,
    /// Readings in accepted repeats.
    pub repeated: u64,
    /// Accepted messages that must end as a dead letter, by place in [`REASONS`].
    pub dead_letters: [u64; REASONS.len()],
    /// Attempts at such messages that were never answered.
    pub unknown_dead_letters: u64,
    /// Accepted messages with a flaw, repeats aside, by place in [`FLAWS`].
    pub flaws: [u64; FLAWS.len()],
}

/// A copy of the books at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// In the order of the connection's devices.
    pub tallies: Vec<Tally>,
    pub totals: Totals,
    /// Good readings that may or may not have been taken: device number, timestamp.
    pub unknown: Vec<(u32, i64)>,
}

impl Account {
    /// The books of connection `connection`.
    #[must_use]
    pub fn new(settings: &FleetSettings, connection: u32) -> Self {
        let stride = settings.connections;
        let devices = settings.devices.saturating_sub(connection).div_ceil(stride);
        Self {
            first: connection,
            stride,
            rows: vec![Row::default(); devices as usize],
            turn: 0,
            seed: settings.seed,
            readings: settings.array,
            // Even, like every timestamp but the late ones.
            spacing_us: u32::try_from(micros(settings.array_spacing)).unwrap_or(u32::MAX) & !1,
            late_us: micros(settings.trouble.late_by) & !1,
            repeat_after: settings.trouble.duplicate_after,
            flaws: settings.trouble.table(),
            waiting: VecDeque::new(),
            totals: Totals::default(),
            unknown: Vec::new(),
        }
    }

    /// Number of devices of this connection.
    #[must_use]
    pub fn devices(&self) -> u32 {
        u32::try_from(self.rows.len()).unwrap_or(u32::MAX)
    }

    /// The next message of the next device in turn. Its newest reading is taken at `wall_us`; a device's readings
    /// never share a timestamp: plain ones are even and strictly increase, late ones are odd.
    pub fn next(&mut self, wall_us: i64) -> Option<Message> {
        let turn = self.turn;
        let devices = self.rows.len();
        let row = self.rows.get_mut(turn)?;
        let device = self.first + u32::try_from(turn).ok()? * self.stride;
        self.turn = (turn + 1) % devices;
        let flaw = self.flaws.draw(self.seed, device, row.sequence);
        let steps = i64::from(self.readings - 1);
        let now = (wall_us & !1).max(row.last_us + 2 + 2 * steps);
        let earliest = row.last_us + 2;
        let spacing = if steps == 0 {
            i64::from(self.spacing_us)
        } else {
            // An array must not reach back behind the device's last reading.
            i64::from(self.spacing_us).min(((now - earliest) / steps) & !1)
        };
        let late = if flaw == Flaw::Late { 1 - self.late_us } else { 0 };
        let message = Message {
            device,
            sequence: row.sequence,
            first_us: now - spacing * steps + late,
            spacing_us: u32::try_from(spacing).unwrap_or(2),
            readings: self.readings,
            flaw,
            repeat: false,
            uncertain: false,
            sent_us: 0,
        };
        row.last_us = now;
        row.sequence += u64::from(self.readings);
        Some(message)
    }

    /// The oldest planned repeat, if its time has come.
    pub fn due_repeat(&mut self, now: Duration) -> Option<Message> {
        self.waiting.pop_front_if(|(due, _)| *due <= now).map(|(_, message)| message)
    }

    /// The broker took the message.
    pub fn accept(&mut self, message: &Message, now: Duration) {
        self.totals.acknowledged += 1;
        if message.repeat {
            self.totals.repeated += u64::from(message.readings);
            return;
        }
        if let Some(count) = message.flaw.dead_letter().and_then(|at| self.totals.dead_letters.get_mut(at)) {
            *count += 1;
        }
        if let Some(count) = message.flaw.number().and_then(|at| self.totals.flaws.get_mut(at)) {
            *count += 1;
        }
        let at = ((message.device - self.first) / self.stride) as usize;
        if let Some(row) = self.rows.get_mut(at) {
            message.good().for_each(|timestamp_us| row.tally.add(timestamp_us));
        }
        if message.flaw == Flaw::Duplicate && self.waiting.len() < MAX_WAITING_REPEATS {
            let repeat = Message { repeat: true, uncertain: false, ..*message };
            self.waiting.push_back((now + self.repeat_after, repeat));
        }
    }

    /// The broker refused the message. Only an earlier, unanswered attempt can have made it through.
    pub fn refuse(&mut self, message: &Message) {
        if message.uncertain && !message.repeat {
            self.unknown.extend(message.good().map(|timestamp_us| (message.device, timestamp_us)));
        }
    }

    /// The connection ended before the broker answered.
    pub fn unanswered(&mut self, message: &Message) {
        if !message.repeat && message.flaw.dead_letter().is_some() {
            self.totals.unknown_dead_letters += 1;
        }
    }

    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// A copy of the books. `under_way`: messages on the connection now; `to_send_again`: those whose last
    /// attempt was [`Account::unanswered`].
    pub fn snapshot<'a>(
        &self,
        under_way: impl Iterator<Item = &'a Message>,
        to_send_again: impl Iterator<Item = &'a Message>,
    ) -> Snapshot {
        let mut totals = self.totals;
        let mut unknown = self.unknown.clone();
        let mut open = |message: &Message| {
            if !message.repeat {
                unknown.extend(message.good().map(|timestamp_us| (message.device, timestamp_us)));
            }
        };
        for message in under_way {
            open(message);
            totals.unknown_dead_letters += u64::from(!message.repeat && message.flaw.dead_letter().is_some());
        }
        to_send_again.for_each(open);
        Snapshot { tallies: self.rows.iter().map(|row| row.tally).collect(), totals, unknown }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::trouble::TroubleSettings;
    use std::collections::HashSet;

    const NOW: Duration = Duration::from_secs(1);
    const WALL: i64 = 1_770_091_506_789_013;

    fn account(array: u16, trouble: TroubleSettings) -> Account {
        let settings =
            FleetSettings { devices: 10, connections: 4, array, trouble, ..FleetSettings::default() };
        Account::new(&settings, 1)
    }

    fn snapshot(account: &Account) -> Snapshot {
        account.snapshot(std::iter::empty(), std::iter::empty())
    }

    #[test]
    fn devices_are_dealt_out_without_gap_or_overlap() {
        for (devices, connections) in [(10, 4), (10, 10), (7, 3), (100_000, 16), (5, 1)] {
            let settings = FleetSettings { devices, connections, ..FleetSettings::default() };
            let mut seen = HashSet::new();
            for connection in 0..connections {
                let mut account = Account::new(&settings, connection);
                for _ in 0..account.rows.len() {
                    assert!(seen.insert(account.next(WALL).unwrap().device));
                }
            }
            assert_eq!(seen.len(), devices as usize);
            assert!(seen.iter().all(|device| *device < devices));
        }
    }

    #[test]
    fn a_devices_timestamps_are_distinct_even_with_a_standing_or_backward_clock() {
        for array in [1, 7] {
            let late =
                TroubleSettings { late: 0.3, late_by: Duration::from_micros(40), ..Default::default() };
            let mut account = account(array, late);
            let mut seen = HashSet::new();
            for round in 0..500_i64 {
                for _ in 0..3 {
                    let message =
                        account.next(WALL + [0, 0, -3_000_000, 5, 40][(round % 5) as usize]).unwrap();
                    for timestamp_us in message.good() {
                        assert!(seen.insert((message.device, timestamp_us)), "{message:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn an_array_ends_now_and_does_not_reach_behind_the_last_one() {
        let mut account = account(100, TroubleSettings::default());
        let first = account.next(WALL).unwrap();
        assert_eq!(first.good().last(), Some(WALL & !1));
        assert_eq!(first.spacing_us, 10_000);
        for _ in 0..2 {
            account.next(WALL).unwrap();
        }
        let second = account.next(WALL + 100_000).unwrap();
        assert_eq!(second.device, first.device);
        assert_eq!(second.sequence, 100);
        assert_eq!(second.good().last(), Some((WALL + 100_000) & !1));
        assert!(second.first_us > WALL);
    }

    #[test]
    fn only_what_was_accepted_is_tallied_and_repeats_are_counted_apart() {
        let mut account = account(1, TroubleSettings { duplicate: 1.0, ..Default::default() });
        let (kept, refused) = (account.next(WALL).unwrap(), account.next(WALL).unwrap());
        account.accept(&kept, NOW);
        account.refuse(&refused);
        assert_eq!(account.due_repeat(NOW), None);
        let repeat = account.due_repeat(NOW + Duration::from_secs(1)).unwrap();
        assert_eq!((repeat.sequence, repeat.first_us), (kept.sequence, kept.first_us));
        account.accept(&repeat, NOW);
        assert_eq!(account.due_repeat(NOW + Duration::from_secs(9)), None, "a repeat is not repeated");
        let books = snapshot(&account);
        assert_eq!(books.tallies.iter().map(|tally| tally.count).collect::<Vec<_>>(), [1, 0, 0]);
        assert_eq!((books.totals.acknowledged, books.totals.repeated), (2, 1));
        assert_eq!(
            books.totals.flaws,
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            "one duplicate, however often it came"
        );
        assert!(books.unknown.is_empty());
    }

    #[test]
    fn dead_letters_are_counted_by_reason_and_unanswered_ones_apart() {
        let mut account = account(3, TroubleSettings { wrong_type: 1.0, ..Default::default() });
        let message = account.next(WALL).unwrap();
        account.unanswered(&message);
        account.accept(&Message { uncertain: true, ..message }, NOW);
        let books = snapshot(&account);
        assert_eq!(books.totals.dead_letters, [0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(books.totals.unknown_dead_letters, 1, "the first attempt may have arrived too");
        assert_eq!(books.tallies[0].count, 2, "the good ones of the array");
    }

    #[test]
    fn what_has_no_answer_is_unknown() {
        let mut account = account(1, TroubleSettings::default());
        let (a, b, c) =
            (account.next(WALL).unwrap(), account.next(WALL).unwrap(), account.next(WALL).unwrap());
        account.refuse(&Message { uncertain: true, ..a });
        let repeat = Message { repeat: true, ..c };
        let books = account.snapshot([b, repeat].iter(), [c].iter());
        let expected = [(a.device, a.first_us), (b.device, b.first_us), (c.device, c.first_us)];
        assert_eq!(books.unknown, expected);
    }
}
