//! One MQTT message as it is remembered: small enough to keep thousands, enough to write it again byte for byte.

use super::payload::{self, Writer};
use super::trouble::{self, Flaw, TroubleSettings};
use wire::fleet::Device;

/// A message that is to be sent, was sent, or must be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Number of the device in the fleet.
    pub device: u32,
    /// Of the first reading.
    pub sequence: u64,
    /// Timestamp of the first reading, microseconds since 1970.
    pub first_us: i64,
    /// Microseconds from one reading to the next.
    pub spacing_us: u32,
    /// Readings in it; above 1 the payload is an array.
    pub readings: u16,
    pub flaw: Flaw,
    /// The broker has acknowledged this message before; it is sent again on purpose.
    pub repeat: bool,
    /// An earlier attempt was never answered: the broker may have taken it.
    pub uncertain: bool,
    /// When it was last sent, microseconds since the simulator's start.
    pub sent_us: u64,
}

impl Message {
    /// Timestamps of the readings that must be stored if the broker takes the message.
    pub fn good(&self) -> impl Iterator<Item = i64> + use<> {
        let Self { first_us, spacing_us, readings, flaw, .. } = *self;
        (0..readings)
            .filter(move |reading| flaw.spares(*reading, readings))
            .map(move |reading| first_us + i64::from(spacing_us) * i64::from(reading))
    }

    /// Appends topic and payload, the same bytes every time.
    pub fn write(
        &self,
        topic: &mut Vec<u8>,
        out: &mut Vec<u8>,
        writer: &mut Writer,
        trouble: &TroubleSettings,
    ) {
        let device = Device::new(self.device);
        payload::topic(topic, &device);
        let start = out.len();
        if self.readings == 1 {
            self.write_reading(out, writer, &device, 0, trouble);
        } else {
            for reading in 0..self.readings {
                out.push(if reading == 0 { b'[' } else { b',' });
                self.write_reading(out, writer, &device, reading, trouble);
            }
            out.push(b']');
        }
        if matches!(self.flaw, Flaw::NotJson | Flaw::TooLarge) {
            trouble::spoil_message(out, start, self.flaw, self.variant(), trouble.oversize);
        }
    }

    fn write_reading(
        &self,
        out: &mut Vec<u8>,
        writer: &mut Writer,
        device: &Device,
        reading: u16,
        trouble: &TroubleSettings,
    ) {
        let from = out.len();
        let mut timestamp_us = self.first_us + i64::from(self.spacing_us) * i64::from(reading);
        let flawed = self.flaw != Flaw::None && reading == Flaw::place(self.readings);
        if flawed {
            match self.flaw {
                Flaw::TooOld => timestamp_us -= micros(trouble.too_old_by),
                Flaw::FarFuture => timestamp_us += micros(trouble.far_future_by),
                _ => {}
            }
        }
        writer.reading(out, device, self.sequence + u64::from(reading), timestamp_us);
        if flawed {
            trouble::spoil(out, from, self.flaw, self.variant());
        }
    }

    fn variant(&self) -> u64 {
        trouble::variant(self.device, self.sequence)
    }
}

/// Whole microseconds; settings keep every duration below a century.
#[must_use]
pub fn micros(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    const AT: i64 = 1_770_091_506_000_000;

    fn message(flaw: Flaw, readings: u16) -> Message {
        Message {
            device: 8,
            sequence: 40,
            first_us: AT,
            spacing_us: 10_000,
            readings,
            flaw,
            repeat: false,
            uncertain: false,
            sent_us: 0,
        }
    }

    fn written(message: &Message) -> (String, Vec<u8>) {
        let (mut topic, mut out) = (Vec::new(), Vec::new());
        message.write(&mut topic, &mut out, &mut Writer::new(1), &TroubleSettings::default());
        (String::from_utf8(topic).unwrap(), out)
    }

    #[test]
    fn a_message_is_the_same_whenever_it_is_written() {
        for flaw in [Flaw::None, Flaw::NotJson, Flaw::WrongType, Flaw::NulCharacter] {
            assert_eq!(written(&message(flaw, 3)), written(&message(flaw, 3)));
        }
    }

    #[test]
    fn an_array_holds_consecutive_readings_of_one_device() {
        let (topic, out) = written(&message(Flaw::None, 100));
        let readings: Vec<Value> = serde_json::from_slice(&out).unwrap();
        assert_eq!(readings.len(), 100);
        let times: Vec<&str> = readings.iter().map(|r| r["timestamp_utc"].as_str().unwrap()).collect();
        assert_eq!(times[0], "2026-02-03T04:05:06.000000Z");
        assert_eq!(times[99], "2026-02-03T04:05:06.990000Z");
        assert!(times.is_sorted_by(|a, b| a < b));
        assert!(readings.iter().all(|r| topic.ends_with(&format!("/{}", r["device_id"].as_str().unwrap()))));
        assert_eq!(message(Flaw::None, 100).good().last(), Some(AT + 990_000));
    }

    #[test]
    fn one_flawed_reading_leaves_the_others_of_its_array_good() {
        let mut old = message(Flaw::TooOld, 5);
        let (_, out) = written(&old);
        let readings: Vec<Value> = serde_json::from_slice(&out).unwrap();
        let old_ones =
            readings.iter().filter(|r| r["timestamp_utc"].as_str().unwrap().starts_with("2026-01"));
        assert_eq!(old_ones.count(), 1);
        assert_eq!(old.good().collect::<Vec<_>>(), [AT, AT + 10_000, AT + 30_000, AT + 40_000]);
        old.flaw = Flaw::NotJson;
        assert_eq!(old.good().count(), 0);
    }
}
