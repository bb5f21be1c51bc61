//! What is read again.

/// Keys remembered of one batch. One would find a batch that vanished as a whole; several also find one that vanished in part.
pub const KEYS_PER_BATCH: usize = 3;

/// What is read again: the key of a committed reading, or of a session and the time of an event of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub id: Box<str>,
    /// Microseconds since 1970.
    pub at_us: i64,
}

/// Keys chosen of a batch.
#[derive(Debug, Default)]
pub struct Chosen {
    pub keys: Vec<Key>,
    /// So many are missing, since none of the rows they might be of is in the table.
    pub skipped: usize,
}

/// Chooses by `random` one row of each of [`KEYS_PER_BATCH`] parts of a batch of so many rows. `key` is `None` for a row that is not
/// in the table; the next one of its part takes its place.
pub(crate) fn choose(rows: usize, random: u64, key: impl Fn(usize) -> Option<Key>) -> Chosen {
    let part = rows.div_ceil(KEYS_PER_BATCH).max(1);
    let mut chosen = Chosen::default();
    for number in 0..KEYS_PER_BATCH {
        let (from, to) = (number * part, rows.min((number + 1) * part));
        let offset = usize::try_from((random >> (16 * number)) % 65_536).unwrap_or_default() % part;
        let first = (from + offset).min(to);
        match (first..to).chain(from..first).find_map(&key) {
            Some(key) => chosen.keys.push(key),
            None if from < to => chosen.skipped += 1,
            None => {}
        }
    }
    chosen
}
