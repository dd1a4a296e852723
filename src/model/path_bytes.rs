//! Paths in messages and reports. In messages any bytes, as the kernel has them, and not only UTF-8 as in serde's own
//! form; in postcard both look the same.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use serde::de::Visitor;
use serde::{Deserializer, Serializer};

pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(path.as_os_str().as_bytes())
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    struct Bytes;
    impl<'de> Visitor<'de> for Bytes {
        type Value = PathBuf;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("the bytes of a path")
        }

        fn visit_bytes<E>(self, bytes: &[u8]) -> Result<PathBuf, E> {
            Ok(OsString::from_vec(bytes.to_vec()).into())
        }
    }
    deserializer.deserialize_bytes(Bytes)
}

/// For people and their JSON: bytes that are no UTF-8 are replaced.
pub fn words<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// As messages have a path that need not be given.
pub mod option {
    use std::path::PathBuf;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Given(#[serde(with = "super")] PathBuf);

    pub fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        path.clone().map(Given).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<Given>::deserialize(deserializer)?.map(|Given(path)| path))
    }
}
