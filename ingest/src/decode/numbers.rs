//! Numbers that jsonb takes in a few bytes and gives back in thousands, and nesting too deep for it.
//!
//! jsonb holds numbers exactly: `1e7600` comes back as 7,601 digits. What a double can hold grows to 326 characters at most.

use super::shown;

/// Deepest nesting that is stored. Postgres' parser needs its stack for each level; this is a fraction of what it has by
/// default (2 MB, some 6,000 levels).
pub(super) const MAX_DEPTH: usize = 1024;

/// Significant digits of a number; a double needs 17 to be exact.
const MAX_DIGITS: usize = 40;
/// Of the smallest double, 5e-324.
const MAX_EXPONENT: u32 = 324;

/// What of a (valid) JSON text must not be stored, in words. One pass over the text.
pub(super) fn refused(json: &str) -> Option<String> {
    let bytes = json.as_bytes();
    let (mut at, mut depth) = (0, 0_usize);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = end_of_string(bytes, at + 1),
            b'{' | b'[' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Some(format!("nested more than {MAX_DEPTH} levels deep"));
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'-' | b'0'..=b'9' => {
                let rest = bytes.get(at..).unwrap_or_default();
                let is_part = |byte: &&u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
                let length = rest.iter().take_while(is_part).count();
                let number = json.get(at..at + length).unwrap_or_default();
                if !fits(number) {
                    let error = format!("{} is more than double precision holds", shown(number));
                    return Some(error);
                }
                at += length;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// Where the string's closing quote is; the length when it has none.
fn end_of_string(bytes: &[u8], mut at: usize) -> usize {
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        match memchr::memchr2(b'"', b'\\', rest) {
            Some(found) if rest.get(found) == Some(&b'"') => return at + found,
            Some(found) => at += found + 2,
            None => return bytes.len(),
        }
    }
}

fn fits(number: &str) -> bool {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, ""));
    let leading = mantissa.trim_start_matches(['-', '0', '.']);
    if leading.bytes().filter(u8::is_ascii_digit).count() > MAX_DIGITS {
        return false;
    }
    if exponent.is_empty() {
        return true;
    }
    // One with more digits than fit is too large too.
    let small = exponent.parse::<i32>().is_ok_and(|exponent| exponent.unsigned_abs() <= MAX_EXPONENT);
    small && number.parse::<f64>().is_ok_and(f64::is_finite)
}
