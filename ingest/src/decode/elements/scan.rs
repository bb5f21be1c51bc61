//! Where one element of an array ends.
//!
//! Normally where its brackets are closed. An element that lacks its end (a device's message cut off, put into an array by a
//! gateway) would swallow its neighbours: the quote of a string that was never closed turns strings and structure around.
//! Two signs of that are looked for: `, {` where only a key can be, and a string that ends with `, {`. Neither is believed
//! alone of an element that may be good JSON.

/// An element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scanned {
    pub(super) end: usize,
    /// Whether it has an end of its own, or is cut off by the end of the text.
    pub(super) closed: bool,
    /// Bytes after `end` that were looked at.
    pub(super) wasted: usize,
}

/// Kinds of the open brackets are known while an element stays above this depth.
const KNOWN_DEPTH: u32 = 64;

/// The element that begins at `start`, where there is neither white space nor a comma. `budget`: how much may be wasted.
pub(super) fn scan(text: &[u8], start: usize, budget: usize) -> Scanned {
    match text.get(start) {
        Some(b'{' | b'[') => nested(text, start, budget),
        Some(b'"') => match end_of_string(text, start + 1) {
            Some((quote, _)) => whole(quote + 1),
            None => Scanned { end: text.len(), closed: false, wasted: 0 },
        },
        // A number, a word or garbage.
        _ => {
            let rest = text.get(start..).unwrap_or_default();
            let length =
                rest.iter().skip(1).take_while(|byte| !matches!(byte, b',' | b']' | b'{' | b'[' | b'"'));
            let end = (start + 1 + length.count()).min(text.len());
            Scanned { end, closed: end < text.len(), wasted: 0 }
        }
    }
}

fn whole(end: usize) -> Scanned {
    Scanned { end, closed: true, wasted: 0 }
}

fn nested(text: &[u8], start: usize, budget: usize) -> Scanned {
    let mut at = start;
    // The lowest bit is the innermost bracket: 1 for an object.
    let (mut depth, mut kinds, mut known) = (0_u32, 0_u64, true);
    // Something that JSON does not have.
    let mut odd = false;
    // The comma after which another element seems to begin.
    let mut next: Option<usize> = None;
    let mut comma: Option<usize> = None;
    while let Some(byte) = text.get(at) {
        match byte {
            b'"' => {
                let Some((quote, control)) = end_of_string(text, at + 1) else {
                    at = text.len();
                    break;
                };
                odd |= control;
                next = next.or_else(|| comma_before_brace(text, at + 1, quote));
                at = quote;
                comma = None;
            }
            b'{' | b'[' => {
                if let (b'{', Some(comma)) = (byte, comma)
                    && known
                    && kinds & 1 == 1
                {
                    // After a comma an object goes on with a key.
                    odd = true;
                    next = next.or(Some(comma));
                }
                depth += 1;
                known &= depth <= KNOWN_DEPTH;
                kinds = kinds << 1 | u64::from(*byte == b'{');
                comma = None;
            }
            b'}' | b']' => {
                odd |= known && (kinds & 1 == 1) != (*byte == b'}');
                kinds >>= 1;
                depth -= 1;
                comma = None;
                if depth == 0 && !odd {
                    return whole(at + 1);
                }
            }
            b',' => comma = Some(at),
            b' ' | b'\n' | b'\r' | b'\t' => {}
            b':' | b'0'..=b'9' | b'+' | b'-' | b'.' => comma = None,
            // The letters of true, false, null, exponents, NaN and Infinity.
            b't' | b'r' | b'u' | b'e' | b'E' | b'f' | b'a' | b'l' | b's' | b'n' | b'N' | b'I' | b'i'
            | b'y' => comma = None,
            _ => {
                odd = true;
                comma = None;
            }
        }
        at += 1;
        if let Some(end) = next.filter(|end| odd && at - end <= budget) {
            return Scanned { end, closed: true, wasted: at - end };
        }
        if depth == 0 {
            return whole(at);
        }
    }
    match next.filter(|end| at - end <= budget) {
        Some(end) => Scanned { end, closed: true, wasted: at - end },
        None => Scanned { end: text.len(), closed: false, wasted: 0 },
    }
}

/// The closing quote of a string whose first byte is at `start`, and whether the string holds a control character, which
/// JSON does not allow.
fn end_of_string(text: &[u8], start: usize) -> Option<(usize, bool)> {
    let (mut at, mut control) = (start, false);
    loop {
        match text.get(at)? {
            b'"' => return Some((at, control)),
            b'\\' => at += 1,
            byte => control |= *byte < 0x20,
        }
        at += 1;
    }
}

/// The comma of a string (`start..end`) that ends with `, {`.
fn comma_before_brace(text: &[u8], start: usize, end: usize) -> Option<usize> {
    let last = |end: usize| {
        let part = text.get(start..end)?;
        let at = part.iter().rposition(|byte| !matches!(byte, b' ' | b'\n' | b'\r' | b'\t'))?;
        Some((start + at, *part.get(at)?))
    };
    let (brace, b'{') = last(end)? else { return None };
    let (comma, b',') = last(brace)? else { return None };
    Some(comma)
}
