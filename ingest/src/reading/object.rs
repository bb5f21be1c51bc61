//! The known keys of a reading as slices of the payload, by serde_json in one pass.

use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::value::RawValue;

/// The raw JSON text of each known key. `None`: absent, or an optional key that is null. The last of repeated keys
/// counts, as in jsonb.
#[derive(Debug, Default)]
pub(super) struct Fields<'a> {
    pub(super) device_id: Option<&'a str>,
    pub(super) device_type: Option<&'a str>,
    pub(super) site_id: Option<&'a str>,
    pub(super) timestamp_utc: Option<&'a str>,
    pub(super) metrics: Option<&'a str>,
    pub(super) firmware: Option<&'a str>,
    pub(super) status: Option<&'a str>,
    pub(super) location: Option<&'a str>,
    pub(super) tags: Option<&'a str>,
}

pub(super) enum Document {
    Object,
    Array,
}

/// Reads a document that is an object or an array of objects and hands over the fields of each.
///
/// # Errors
/// For everything else; the caller finds out what it was.
pub(super) fn read<'a>(
    text: &'a str,
    mut each: impl FnMut(Fields<'a>),
) -> Result<Document, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let document = deserializer.deserialize_any(DocumentVisitor(&mut each))?;
    deserializer.end()?;
    Ok(document)
}

struct DocumentVisitor<'f, F>(&'f mut F);

impl<'de, F: FnMut(Fields<'de>)> Visitor<'de> for DocumentVisitor<'_, F> {
    type Value = Document;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a reading or an array of readings")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Document, A::Error> {
        (self.0)(fields(map)?);
        Ok(Document::Object)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Document, A::Error> {
        while elements.next_element_seed(Element(&mut *self.0))?.is_some() {}
        Ok(Document::Array)
    }
}

struct Element<'f, F>(&'f mut F);

impl<'de, F: FnMut(Fields<'de>)> DeserializeSeed<'de> for Element<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: FnMut(Fields<'de>)> Visitor<'de> for Element<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a reading")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        (self.0)(fields(map)?);
        Ok(())
    }
}

fn fields<'de, A: MapAccess<'de>>(mut map: A) -> Result<Fields<'de>, A::Error> {
    let mut fields = Fields::default();
    while let Some(key) = map.next_key::<Key>()? {
        let slot = match key {
            Key::DeviceId => &mut fields.device_id,
            Key::DeviceType => &mut fields.device_type,
            Key::SiteId => &mut fields.site_id,
            Key::TimestampUtc => &mut fields.timestamp_utc,
            Key::Metrics => &mut fields.metrics,
            Key::Firmware => &mut fields.firmware,
            Key::Status => &mut fields.status,
            Key::Location => &mut fields.location,
            Key::Tags => &mut fields.tags,
            Key::Other => {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
        };
        let raw = map.next_value::<&'de RawValue>()?.get();
        *slot = if raw == "null" && key.is_optional() { None } else { Some(raw) };
    }
    Ok(fields)
}

#[derive(Clone, Copy)]
enum Key {
    DeviceId,
    DeviceType,
    SiteId,
    TimestampUtc,
    Metrics,
    Firmware,
    Status,
    Location,
    Tags,
    Other,
}

impl Key {
    fn is_optional(self) -> bool {
        matches!(self, Self::Firmware | Self::Status | Self::Location | Self::Tags)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<Key, E> {
                Ok(match key {
                    "device_id" => Key::DeviceId,
                    "device_type" => Key::DeviceType,
                    "site_id" => Key::SiteId,
                    "timestamp_utc" => Key::TimestampUtc,
                    "metrics" => Key::Metrics,
                    "firmware" => Key::Firmware,
                    "status" => Key::Status,
                    "location" => Key::Location,
                    "tags" => Key::Tags,
                    _ => Key::Other,
                })
            }
        }

        deserializer.deserialize_identifier(KeyVisitor)
    }
}
