//! The elements of a JSON array, also of one that is not JSON as a whole: each is cut out and judged by itself.
//!
//! Brackets are counted and strings skipped; nothing is parsed, copied or kept. The cost is linear in the array's length, whatever
//! its bytes: each is looked at once, and again only when an element was found to have swallowed the next, which is
//! bounded over the whole array ([`RESCANS`]). For an array that is valid JSON these are its elements.

mod scan;

use super::trimmed;
use scan::scan;

/// How many times its length an array may be read again because an element swallowed others.
const RESCANS: usize = 4;

/// One piece of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// The text between two commas, without white space around it. May be anything, also empty.
    Element { index: u32, text: &'a [u8] },
    /// What follows the closing bracket.
    After(&'a [u8]),
    /// The array ends without a closing bracket, after a whole element. Holds the empty rest of it.
    Unclosed(&'a [u8]),
}

/// The pieces of an array, in order.
#[derive(Debug)]
pub(crate) struct Elements<'a> {
    array: &'a [u8],
    at: usize,
    index: u32,
    rescans: usize,
    /// Bytes that were scanned, again or for the first time.
    scanned: usize,
    done: bool,
}

impl<'a> Elements<'a> {
    /// `None` when the text does not begin as an array.
    pub(crate) fn of(text: &'a [u8]) -> Option<Self> {
        let array = trimmed(text).strip_prefix(b"[")?;
        Some(Self { array, at: 0, index: 0, rescans: array.len() * RESCANS, scanned: 0, done: false })
    }

    fn rest(&self) -> &'a [u8] {
        self.array.get(self.at..).unwrap_or_default()
    }

    fn skip_space(&mut self) {
        self.at += self.rest().iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')).count();
    }

    fn element(&mut self, start: usize, end: usize) -> Piece<'a> {
        let index = self.index;
        self.index = self.index.saturating_add(1);
        Piece::Element { index, text: trimmed(self.array.get(start..end).unwrap_or_default()) }
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        if self.done {
            return None;
        }
        self.skip_space();
        let start = self.at;
        match self.rest() {
            [] => {
                self.done = true;
                Some(Piece::Unclosed(self.rest()))
            }
            [b']', after @ ..] => {
                self.done = true;
                let after = trimmed(after);
                (!after.is_empty()).then_some(Piece::After(after))
            }
            [b',', ..] => {
                self.at += 1;
                Some(self.element(start, start))
            }
            _ => {
                let scanned = scan(self.array, start, self.rescans);
                self.rescans = self.rescans.saturating_sub(scanned.wasted);
                self.scanned += scanned.end - start + scanned.wasted;
                self.at = scanned.end;
                self.done = !scanned.closed;
                let piece = self.element(start, scanned.end);
                self.skip_space();
                if self.rest().first() == Some(&b',') {
                    self.at += 1;
                }
                Some(piece)
            }
        }
    }
}

#[cfg(test)]
mod tests;
