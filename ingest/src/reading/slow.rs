//! A message in which something is wrong, taken apart again: what is good of it is kept, what is not is named.

use wire::topic::Topic;

use super::object;
use super::{Reading, Visitor, check};
use crate::dead_letter::Reason;
use crate::decode::elements::{Elements, Piece};
use crate::decode::{self, Hints, Rejection, Rules, described, not_json, utf8};
use crate::tolerated::Tolerated;

pub(super) fn visit<'a>(payload: &'a [u8], topic: &Topic<'_>, rules: &Rules, visitor: &mut impl Visitor<'a>) {
    let Some(elements) = Elements::of(payload) else {
        if let Err(rejection) = visit_element(decode::trimmed(payload), 0, topic, rules, visitor) {
            visitor.rejected(payload, rejection);
        }
        return;
    };
    let mut count = 0;
    for piece in elements {
        match piece {
            Piece::Element { index, text } => {
                count += 1;
                if let Err(rejection) = visit_element(text, index, topic, rules, visitor) {
                    visitor.rejected(text, rejection.at(format_args!("element {index}")));
                }
            }
            Piece::After(text) => {
                visitor.rejected(text, not_json(format!("{} bytes after the array", text.len())));
            }
            Piece::Unclosed(rest) => {
                let error = format!("the array is cut off after {count} elements: EOF instead of ]");
                visitor.rejected(rest, not_json(error));
            }
        }
    }
}

/// The text of one reading of a message that was visited before: the message, or an element of its array.
#[must_use]
pub fn element_at(payload: &[u8], index: u32) -> &[u8] {
    elements_at(payload, std::iter::once(index)).next().unwrap_or(payload)
}

/// As [`element_at`] for readings whose numbers ascend. The payload is walked once for all of them, as far as is asked for.
pub(crate) fn elements_at(payload: &[u8], indices: impl Iterator<Item = u32>) -> impl Iterator<Item = &[u8]> {
    let mut elements = Elements::of(payload);
    indices.map(move |index| {
        let element = elements.as_mut().and_then(|elements| {
            elements.find_map(|piece| match piece {
                Piece::Element { index: of_piece, text } if of_piece == index => Some(text),
                _ => None,
            })
        });
        element.unwrap_or(payload)
    })
}

fn visit_element<'a>(
    element: &[u8],
    index: u32,
    topic: &Topic<'_>,
    rules: &Rules,
    visitor: &mut impl Visitor<'a>,
) -> Result<(), Rejection> {
    let text = utf8(element)?;
    let rejection = match checked(text, index, topic, rules) {
        Ok(reading) => {
            visitor.reading(&reading);
            return Ok(());
        }
        Err(rejection) => rejection,
    };
    if rejection.reason == Reason::NotJson
        && rules.tolerance.lenient.non_finite_as_null
        && let Some(mended) = decode::as_null(text)
        && let Ok(mut reading) = checked(&mended, index, topic, rules)
    {
        reading.tolerated.add(Tolerated::NonFinite);
        visitor.reading(&reading);
        return Ok(());
    }
    Err(rejection)
}

fn checked<'a>(
    element: &'a str,
    index: u32,
    topic: &Topic<'_>,
    rules: &Rules,
) -> Result<Reading<'a>, Rejection> {
    if !element.starts_with('{') {
        decode::check_json(element)?;
        let error = format!("a reading is a JSON object, not {}", described(element));
        return Err(Rejection::new(Reason::WrongType, error));
    }
    let mut outcome = None;
    object::read(element, |fields| outcome = Some(check(&fields, Hints::ANY, index, topic, rules)))
        .map_err(not_json)?;
    outcome.unwrap_or_else(|| Err(not_json("no object")))
}
