//! What was taken although a device sent it in a way the contract does not ask for.
//!
//! A reading carries a set of these; a batch adds them up and the metric grows when the batch is committed.

/// One kind of leniency. The names are public: the metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tolerated {
    /// A timestamp without a zone.
    NoZone,
    /// A timestamp as a count since 1970.
    EpochTime,
    /// A timestamp in ISO 8601 beyond RFC 3339.
    Iso8601,
    /// An id sent as a number.
    NumericId,
    /// An optional field of a wrong type, left out.
    FieldDropped,
    /// NaN or Infinity, stored as null.
    NonFinite,
    /// A byte order mark before the message, or NUL bytes after it.
    Padding,
    /// A message in gzip or zstd.
    Compressed,
    /// A message without a byte: a retained topic was cleared.
    Empty,
}

impl Tolerated {
    pub const ALL: [Self; 9] = [
        Self::NoZone,
        Self::EpochTime,
        Self::Iso8601,
        Self::NumericId,
        Self::FieldDropped,
        Self::NonFinite,
        Self::Padding,
        Self::Compressed,
        Self::Empty,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoZone => "no_zone",
            Self::EpochTime => "epoch_time",
            Self::Iso8601 => "iso_8601",
            Self::NumericId => "numeric_id",
            Self::FieldDropped => "field_dropped",
            Self::NonFinite => "non_finite",
            Self::Padding => "padding",
            Self::Compressed => "compressed",
            Self::Empty => "empty",
        }
    }
}

/// A set of [`Tolerated`]: what was tolerated in one reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tolerances(u16);

impl Tolerances {
    pub const NONE: Self = Self(0);

    #[must_use]
    pub fn contains(self, what: Tolerated) -> bool {
        self.0 & (1 << what as u16) != 0
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn add(&mut self, what: Tolerated) {
        self.0 |= 1 << what as u16;
    }

    /// Those of both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl From<Tolerated> for Tolerances {
    fn from(what: Tolerated) -> Self {
        let mut set = Self::NONE;
        set.add(what);
        set
    }
}

/// How many readings each was tolerated in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally([u32; Tolerated::ALL.len()]);

impl Tally {
    /// Adds one reading.
    pub fn add(&mut self, tolerances: Tolerances) {
        if tolerances.is_empty() {
            return;
        }
        for (what, count) in Tolerated::ALL.into_iter().zip(&mut self.0) {
            *count += u32::from(tolerances.contains(what));
        }
    }

    /// Adds another tally.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.0.iter_mut().zip(other.0) {
            *count += more;
        }
    }

    /// Those that occurred.
    pub fn iter(&self) -> impl Iterator<Item = (Tolerated, u32)> {
        Tolerated::ALL.into_iter().zip(self.0).filter(|(_, count)| *count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_by_itself() {
        let mut tally = Tally::default();
        for (number, what) in Tolerated::ALL.into_iter().enumerate() {
            assert_eq!(what as usize, number, "the place in ALL is the place in the tally");
            for _ in 0..=number {
                tally.add(what.into());
            }
        }
        tally.add(Tolerances::from(Tolerated::NoZone).with(Tolerated::Empty.into()));
        let mut sum = Tally::default();
        sum.merge(&tally);
        let counts: Vec<u32> = sum.iter().map(|(_, count)| count).collect();
        assert_eq!(counts, [2, 2, 3, 4, 5, 6, 7, 8, 10]);
    }
}
