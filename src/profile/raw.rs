//! A profile's TOML as serde reads it: keys, kinds, places. Unknown keys are errors. No rule of profiles
//! is checked here but what a single value shows.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroU32;

use serde::de::value::StrDeserializer;
use serde::de::{self, IntoDeserializer};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use crate::model::moment::{Size, Span};
use crate::model::name::{
    AudienceName, CapabilityName, Channel, Permission, SecretName, VariableName,
};
use crate::profile::capability::{Format, OnRevoke, Protocol, RepositoryPath, Username};
use crate::profile::identity::RawIdentity;
use crate::profile::kinds::{
    CpuQuota, Enforcement, NetworkMode, SeccompFilter, Waiver, WorkspaceAccess,
};
use crate::profile::path::HostPath;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawProfile {
    pub description: Option<String>,
    pub extends: Option<Spanned<String>>,
    #[serde(default)]
    pub filesystem: RawFilesystem,
    #[serde(default)]
    pub network: RawNetwork,
    #[serde(default)]
    pub seccomp: RawSeccomp,
    #[serde(default)]
    pub landlock: RawLandlock,
    #[serde(default)]
    pub limits: RawLimits,
    #[serde(default)]
    pub environment: RawEnvironment,
    #[serde(default)]
    pub capability: Vec<Spanned<RawCapability>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFilesystem {
    pub read_only: Option<Items>,
    pub read_write: Option<Items>,
    pub workspace: Option<WorkspaceAccess>,
    pub tmp: Option<Size>,
    pub home: Option<Spanned<HostPath>>,
    pub root: Option<Spanned<HostPath>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawNetwork {
    pub mode: Option<Spanned<NetworkMode>>,
    pub connect_ports: Option<Vec<u16>>,
    pub bind_ports: Option<Vec<u16>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSeccomp {
    pub filter: Option<SeccompFilter>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLandlock {
    pub enforcement: Option<Enforcement>,
    pub waive: Option<BTreeSet<Waiver>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLimits {
    pub memory: Option<Limit<Size>>,
    pub processes: Option<Limit<NonZeroU32>>,
    pub cpu: Option<Limit<CpuQuota>>,
    pub open_files: Option<Limit<NonZeroU32>>,
    pub file_size: Option<Limit<Size>>,
    pub timeout: Option<Limit<Span>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawEnvironment {
    #[serde(default)]
    pub set: BTreeMap<VariableName, Spanned<String>>,
    pub pass: Option<Items>,
    pub path: Option<Spanned<Items>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCapability {
    pub name: Spanned<CapabilityName>,
    pub permission: Option<Permission>,
    pub channels: Option<Spanned<Vec<Channel>>>,
    pub ttl: Option<Span>,
    pub uses: Option<Spanned<i64>>,
    pub renewable: Option<bool>,
    pub command: Option<Vec<Spanned<Words>>>,
    pub redact: Option<bool>,
    pub on_revoke: Option<OnRevoke>,
    #[serde(default)]
    pub constraints: BTreeMap<String, String>,
    #[serde(default)]
    pub audience: Vec<Spanned<RawAudience>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAudience {
    pub protocol: Option<Spanned<Protocol>>,
    pub host: Spanned<AudienceName>,
    pub path: Option<RepositoryPath>,
    pub secret: Option<Spanned<SecretName>>,
    pub username: Option<Username>,
    pub variable: Option<Spanned<VariableName>>,
    pub identity: Option<Spanned<RawIdentity>>,
    pub format: Option<Format>,
}

/// A list of texts whose elements are parsed one by one, so that an error points at the element.
pub(super) type Items = Vec<Spanned<String>>;

/// One command of `command`, not yet a pattern.
pub(super) struct Words(pub Vec<String>);

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Words;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list of words, as in `command = [[\"git\", \"push\", \"**\"]]`")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some(word) = seq.next_element()? {
                    words.push(word);
                }
                Ok(Words(words))
            }
        }
        d.deserialize_any(Visitor)
    }
}

/// A limit as written: a value, or `"none"` to lift the extended profile's.
#[derive(Clone, Copy)]
pub(super) enum Limit<T> {
    None,
    At(T),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Limit<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Limit<T>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a limit, or \"none\"")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Limit<T>, E> {
                if text == "none" {
                    return Ok(Limit::None);
                }
                T::deserialize(StrDeserializer::new(text)).map(Limit::At)
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Limit<T>, E> {
                T::deserialize(n.into_deserializer()).map(Limit::At)
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Limit<T>, E> {
                T::deserialize(n.into_deserializer()).map(Limit::At)
            }
            fn visit_f64<E: de::Error>(self, n: f64) -> Result<Limit<T>, E> {
                T::deserialize(n.into_deserializer()).map(Limit::At)
            }
        }
        d.deserialize_any(Visitor(PhantomData))
    }
}
