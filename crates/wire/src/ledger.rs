//! The ledger: what a publisher knows the broker accepted, device by device.
//!
//! A simulator writes it, `tier0 verify` compares it with the tables. The comparison is by [`Tally`]: count, first
//! and last timestamp and an order-free checksum, which Postgres computes for the stored rows with
//! [`CHECKSUM_SQL`]. Equal tallies for a device mean the same set of timestamps was accepted and stored, up to a
//! chance of about one in 2^31.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

const MODULUS: i64 = 2_147_483_647;
const FACTOR: i64 = 48_271;

/// The checksum of a [`Tally`] as an SQL aggregate over a bigint column named `us` (microseconds since 1970).
pub const CHECKSUM_SQL: &str = "bit_xor(((us % 2147483647) * 48271) % 2147483647)";

/// A set of readings of one device, folded. Times in microseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    pub count: u64,
    pub first_us: i64,
    pub last_us: i64,
    pub checksum: i64,
}

impl Tally {
    /// Takes one more reading in. The order does not matter; the same timestamp twice counts twice and clears
    /// itself from the checksum, so feed each identity once.
    pub fn add(&mut self, timestamp_us: i64) {
        self.first_us = if self.count == 0 { timestamp_us } else { self.first_us.min(timestamp_us) };
        self.last_us = if self.count == 0 { timestamp_us } else { self.last_us.max(timestamp_us) };
        self.count += 1;
        self.checksum ^= ((timestamp_us % MODULUS) * FACTOR) % MODULUS;
    }
}

/// What one run of a publisher did. One JSON document; at 100,000 devices about 12 MB.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    /// Seed of the run, so that it can be repeated.
    pub seed: u64,
    /// True when the run came to its end and this is all of it. False: a snapshot from mid-run, and what is on
    /// disk when the publisher was killed. Then a device may have more readings stored than are tallied here (never
    /// fewer, `unknown` aside), so a snapshot proves losses but not equality.
    pub complete: bool,
    /// MQTT quality of service used (0: the broker confirms nothing, `acknowledged` counts what was sent).
    pub qos: u8,
    /// Earliest and latest wall clock of the run, microseconds since 1970.
    pub started_us: i64,
    pub ended_us: i64,
    /// Messages the broker acknowledged, of every kind (good, repeated, poison).
    pub acknowledged: u64,
    /// Readings in acknowledged messages that were published before under the same identity.
    pub repeated: u64,
    /// Distinct good readings per device id.
    pub devices: BTreeMap<String, Tally>,
    /// Messages acknowledged that must end as a dead letter, by reason.
    pub dead_letters: BTreeMap<String, u64>,
    /// Good readings whose message was sent but not acknowledged when the run ended (device id, timestamp):
    /// each may or may not be stored.
    pub unknown: Vec<(String, i64)>,
    /// Messages sent but not acknowledged that would end as a dead letter if the broker took them.
    pub unknown_dead_letters: u64,
    /// Messages that the broker did not accept, by its reason. They are nowhere, and nobody was promised
    /// otherwise.
    #[serde(default)]
    pub refused: BTreeMap<String, u64>,
    /// Messages skipped because they were due too long ago.
    #[serde(default)]
    pub skipped: u64,
    /// Messages sent again because a connection was lost.
    #[serde(default)]
    pub resent: u64,
    /// Acknowledged messages with something wrong on purpose, by what is wrong.
    #[serde(default)]
    pub trouble: BTreeMap<String, u64>,
}

impl Ledger {
    /// Distinct good readings acknowledged, over all devices.
    #[must_use]
    pub fn readings(&self) -> u64 {
        self.devices.values().map(|tally| tally.count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_does_not_depend_on_order_and_sees_any_change() {
        let times = [1_770_091_506_789_000_i64, 1_770_091_511_789_123, 1_770_091_516_789_456];
        let fold = |times: &[i64]| {
            let mut tally = Tally::default();
            times.iter().for_each(|t| tally.add(*t));
            tally
        };
        let whole = fold(&times);
        assert_eq!(whole, fold(&[times[2], times[0], times[1]]));
        assert_eq!((whole.count, whole.first_us, whole.last_us), (3, times[0], times[2]));
        assert_ne!(whole.checksum, fold(&times[..2]).checksum);
        assert_ne!(whole.checksum, fold(&[times[0], times[1] + 1, times[2]]).checksum);
    }
}
