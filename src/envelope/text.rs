//! What may stand in a signed document: one line of text, times to the millisecond, maps without doubles.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The text cannot stand in a signed document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot be signed: expected 1 to 1024 characters on one line, without control characters"
)]
pub struct InvalidText(String);

/// 1 to 1024 characters, none of them a control character.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Text(String);

impl Text {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Text {
    type Err = InvalidText;
    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let fits = (1..=1024).contains(&text.chars().count());
        if fits && !text.chars().any(char::is_control) {
            return Ok(Self(text.to_owned()));
        }
        let shown = text.chars().take(80).map(|c| if c.is_control() { '?' } else { c });
        Err(InvalidText(shown.collect()))
    }
}

impl TryFrom<String> for Text {
    type Error = InvalidText;
    fn try_from(text: String) -> Result<Self, InvalidText> {
        text.parse()
    }
}

impl From<Text> for String {
    fn from(text: Text) -> String {
        text.0
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is written has milliseconds; what is held says the same.
pub(super) fn to_the_millisecond(time: jiff::Timestamp) -> jiff::Timestamp {
    jiff::Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time)
}

/// An object of texts in which no key stands twice: two readers must not see two documents.
pub(super) fn unique<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    struct Unique;
    impl<'de> Visitor<'de> for Unique {
        type Value = BTreeMap<String, String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of texts")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = BTreeMap::new();
            while let Some((key, value)) = map.next_entry::<String, String>()? {
                if found.contains_key(&key) {
                    return Err(A::Error::custom(format!("`{key}` stands twice")));
                }
                found.insert(key, value);
            }
            Ok(found)
        }
    }
    deserializer.deserialize_map(Unique)
}

pub(super) mod milliseconds {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::model::moment::timestamp_text;

    pub fn serialize<S: Serializer>(time: &jiff::Timestamp, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&timestamp_text(*time))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<jiff::Timestamp, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}
