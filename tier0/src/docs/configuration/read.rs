//! Sections and keys as the settings types state them: docs and types from their schema, order and defaults from what
//! they serialise to.

use bytesize::ByteSize;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use service::settings::Settings;

/// What one process reads.
#[derive(Debug)]
pub struct Process {
    pub name: &'static str,
    pub sections: Vec<Section>,
}

/// One section, with those inside it.
#[derive(Debug)]
pub struct Section {
    /// For instance `orchestrator.policy`.
    pub name: String,
    pub doc: String,
    pub keys: Vec<Key>,
    pub inner: Vec<Section>,
}

/// One setting.
#[derive(Debug)]
pub struct Key {
    pub name: String,
    pub doc: String,
    /// For people: `time`, `whole number` ..
    pub kind: String,
    /// As TOML has it.
    pub default: Option<String>,
    pub example: Option<String>,
}

impl Key {
    #[must_use]
    pub fn is_secret(&self) -> bool {
        self.kind == "secret"
    }
}

impl Process {
    /// # Panics
    /// When the type does not serialise to what its schema says, which a test finds.
    #[must_use]
    pub fn of<T: Settings + JsonSchema + Default>(name: &'static str) -> Self {
        let generator =
            SchemaSettings::default().with(|settings| settings.inline_subschemas = true).into_generator();
        let schema = generator.into_root_schema_for::<T>().to_value();
        let defaults = serde_json::to_string(&T::default()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let Section { inner: sections, keys, .. } = section("", &schema, &defaults);
        assert!(keys.is_empty(), "{name}: {keys:?} outside any section");
        let names: Vec<&str> = sections.iter().map(|section| section.name.as_str()).collect();
        assert_eq!(names, T::SECTIONS, "{name}: the fields of the settings are their sections");
        Self { name, sections }
    }
}

fn section(name: &str, schema: &Value, defaults: &str) -> Section {
    let Entries(entries) = serde_json::from_str(defaults).unwrap_or_else(|error| panic!("[{name}]: {error}"));
    let (mut keys, mut inner) = (Vec::new(), Vec::new());
    for (key, value) in entries {
        let path = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
        let property = schema
            .get("properties")
            .and_then(|all| all.get(&key))
            .unwrap_or_else(|| panic!("{path} is in no schema"));
        if property.get("properties").is_some() {
            inner.push(section(&path, property, value.get()));
        } else {
            keys.push(self::key(key, property, value.get()));
        }
    }
    Section { name: name.into(), doc: doc(name, schema), keys, inner }
}

fn doc(path: &str, schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    assert!(
        path.is_empty() || text.ends_with('.'),
        "{path} has no doc comment that ends with a full stop: {text:?}"
    );
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn key(name: String, schema: &Value, default: &str) -> Key {
    let format = find(schema, "format").and_then(Value::as_str).unwrap_or_default();
    let kind = kind(&name, schema, format);
    let as_toml = |text: &str| match (format, serde_json::from_str::<Value>(text)) {
        ("size", Ok(Value::String(size))) => format!("\"{}\"", shortest(&size)),
        _ => text.to_owned(),
    };
    let example = find(schema, "examples").and_then(|examples| examples.get(0)).map(Value::to_string);
    let default = (default != "null").then(|| as_toml(default));
    Key { doc: doc(&name, schema), kind, default, example, name }
}

/// A keyword of a schema, also of one that may be missing (`anyOf` with null).
fn find<'s>(schema: &'s Value, keyword: &str) -> Option<&'s Value> {
    let alternatives = schema.get("anyOf").and_then(Value::as_array);
    schema
        .get(keyword)
        .or_else(|| alternatives.into_iter().flatten().find_map(|alternative| alternative.get(keyword)))
}

fn kind(name: &str, schema: &Value, format: &str) -> String {
    let named = match format {
        "time" | "size" | "path" | "secret" => format,
        "rate" => "number or `max`",
        "ip" => "IP address",
        _ => "",
    };
    if !named.is_empty() {
        return named.into();
    }
    let one_of = find(schema, "oneOf").and_then(Value::as_array).into_iter().flatten();
    let constants = one_of.filter_map(|alternative| alternative.get("const").and_then(Value::as_str));
    let enumerated =
        find(schema, "enum").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let values: Vec<String> = constants.chain(enumerated).map(|value| format!("`{value}`")).collect();
    if !values.is_empty() {
        return values.join(" or ");
    }
    let kind = match find(schema, "type") {
        Some(Value::Array(kinds)) => kinds.iter().find_map(Value::as_str),
        kind => kind.and_then(Value::as_str),
    };
    match kind {
        Some("string") => "text",
        Some("boolean") => "`true` or `false`",
        Some("integer") => "whole number",
        Some("number") => "number",
        other => panic!("{name}: what is a {other:?}?"),
    }
    .into()
}

/// `64.0 MiB` as people write it.
fn shortest(size: &str) -> String {
    let bytes = size.parse::<ByteSize>().map_or(0, |size| size.as_u64());
    for (unit, name) in [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")] {
        if bytes >= unit && bytes % unit == 0 {
            return format!("{}{name}", bytes / unit);
        }
    }
    format!("{bytes}B")
}

/// A JSON object with its order.
struct Entries(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
