//! The properties of a packet. They are walked, never collected.

use super::PacketError;
use super::fields::Fields;

pub(super) const SESSION_EXPIRY_INTERVAL: u8 = 17;
pub(super) const ASSIGNED_CLIENT_IDENTIFIER: u8 = 18;
pub(super) const SERVER_KEEP_ALIVE: u8 = 19;
pub(super) const SERVER_REFERENCE: u8 = 28;
pub(super) const REASON_STRING: u8 = 31;
pub(super) const TOPIC_ALIAS: u8 = 35;
pub(super) const MAXIMUM_QOS: u8 = 36;
pub(super) const USER_PROPERTY: u8 = 38;
pub(super) const MAXIMUM_PACKET_SIZE: u8 = 39;
pub(super) const WILDCARD_SUBSCRIPTION_AVAILABLE: u8 = 40;
pub(super) const SHARED_SUBSCRIPTION_AVAILABLE: u8 = 42;

/// Longest text of the broker that is shown, in characters.
const MAX_SHOWN: usize = 200;

/// One property. Texts and binary data are as they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Number(u32),
    Bytes(&'a [u8]),
    Pair,
}

impl Value<'_> {
    /// 0 for what is no number.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Number(number) => number,
            Self::Bytes(_) | Self::Pair => 0,
        }
    }

    /// A text of the broker as it can be shown: bounded, and without control characters.
    pub(super) fn shown(self) -> String {
        match self {
            Self::Bytes(bytes) => String::from_utf8_lossy(bytes)
                .chars()
                .take(MAX_SHOWN)
                .map(|letter| if letter.is_control() { '\u{fffd}' } else { letter })
                .collect(),
            Self::Number(_) | Self::Pair => String::new(),
        }
    }
}

/// What is left of a packet's block of properties.
#[derive(Debug)]
pub(super) struct Properties<'a> {
    fields: Fields<'a>,
    /// Bit by property: which have come. All but user properties may come once.
    seen: u64,
}

impl<'a> Properties<'a> {
    /// Takes the block out of the packet.
    pub(super) fn begin(packet: &'static str, fields: &mut Fields<'a>) -> Result<Self, PacketError> {
        const CUT: &str = "its properties are longer than the packet";
        let length = fields.variable(CUT)?;
        let block = fields.take(usize::try_from(length).unwrap_or(usize::MAX), CUT)?;
        Ok(Self { fields: Fields::new(packet, block), seen: 0 })
    }

    pub(super) fn next(&mut self) -> Result<Option<(u8, Value<'a>)>, PacketError> {
        const CUT: &str = "a property is longer than its block";
        if self.fields.is_empty() {
            return Ok(None);
        }
        let fields = &mut self.fields;
        let id = fields.byte(CUT)?;
        let value = match id {
            1
            | 23
            | 25
            | MAXIMUM_QOS
            | 37
            | WILDCARD_SUBSCRIPTION_AVAILABLE
            | 41
            | SHARED_SUBSCRIPTION_AVAILABLE => Value::Number(fields.byte(CUT)?.into()),
            SERVER_KEEP_ALIVE | 33 | 34 | TOPIC_ALIAS => Value::Number(fields.two(CUT)?.into()),
            2 | SESSION_EXPIRY_INTERVAL | 24 | MAXIMUM_PACKET_SIZE => Value::Number(fields.four(CUT)?),
            11 => Value::Number(fields.variable(CUT)?),
            3 | 8 | 9 | ASSIGNED_CLIENT_IDENTIFIER | 21 | 22 | 26 | SERVER_REFERENCE | REASON_STRING => {
                Value::Bytes(fields.bytes(CUT)?)
            }
            USER_PROPERTY => {
                fields.bytes(CUT)?;
                fields.bytes(CUT)?;
                Value::Pair
            }
            _ => return Err(fields.malformed("it has a property that MQTT 5 does not know")),
        };
        let bit = 1 << id;
        // A packet may have several subscription identifiers (11).
        if self.seen & bit != 0 && !matches!(id, USER_PROPERTY | 11) {
            return Err(self.fields.malformed("it has a property twice"));
        }
        self.seen |= bit;
        Ok(Some((id, value)))
    }
}
