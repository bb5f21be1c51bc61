//! A site report that is not JSON because of its list: taken apart into the list and the rest.

use memchr::memmem;

use crate::decode::elements::{Elements, Piece};
use crate::decode::trimmed;

/// A report whose list is not JSON.
#[derive(Debug)]
pub(super) struct Broken<'a> {
    /// From the list's first bracket to the end of the message.
    pub(super) list: &'a [u8],
    /// The report without its list. Is JSON, or the report is broken elsewhere too.
    pub(super) rest: String,
}

/// Finds the list by its key. `None` when there is none, or when what is before it is not text.
pub(super) fn split<'a>(payload: &'a [u8], key: &str) -> Option<Broken<'a>> {
    let quoted = format!("\"{key}\"");
    let at = memmem::find(payload, quoted.as_bytes())?;
    let before = trimmed(payload.get(..at)?);
    let value = trimmed(payload.get(at + quoted.len()..)?).strip_prefix(b":")?;
    let list = trimmed(value);
    let mut after: &[u8] = b"}";
    for piece in Elements::of(list)? {
        if let Piece::After(text) = piece {
            after = text;
        }
    }
    // `{"a":1, LIST, "b":2}` without its list.
    let before = before.strip_suffix(b",").unwrap_or(before);
    let after = if before == b"{" { after.strip_prefix(b",").unwrap_or(after) } else { after };
    let rest = [before, after].concat();
    Some(Broken { list, rest: String::from_utf8(rest).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_taken_out() {
        for (text, list, rest) in [
            ("{\"a\":1,\"l\":[x],\"b\":2}", "[x],\"b\":2}", "{\"a\":1,\"b\":2}"),
            ("{ \"l\" : [x] , \"b\":2}", "[x] , \"b\":2}", "{ \"b\":2}"),
            ("{\"a\":1,\"l\":[x]}", "[x]}", "{\"a\":1}"),
            ("{\"a\":1,\"l\":[x", "[x", "{\"a\":1}"),
            // Whatever else is broken stays broken.
            ("{\"a\":1,\"l\":[x],1],\"b\":2}", "[x],1],\"b\":2}", "{\"a\":1,1],\"b\":2}"),
            ("{\"a\":{\"l\":[x]},\"b\":2}", "[x]},\"b\":2}", "{\"a\":{},\"b\":2}"),
        ] {
            let broken = split(text.as_bytes(), "l").unwrap();
            assert_eq!((broken.list, broken.rest.as_str()), (list.as_bytes(), rest), "{text}");
        }
        for text in ["{}", "{\"l\":17}", "{\"l\"", "\"l\":{}"] {
            assert!(split(text.as_bytes(), "l").is_none(), "{text}");
        }
    }
}
