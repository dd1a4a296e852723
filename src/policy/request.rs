//! What is asked. The flag's text or the wire's fields go in; a typed [`Request`] comes out.
#![forbid(unsafe_code)]

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::id::{RequestId, RunId};
use crate::model::moment::{InvalidQuantity, Span};
use crate::model::name::{AudienceName, CapabilityName, Channel, InvalidName};

/// One lease asked for, by one run. What is left out, policy fills in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Shared by all leases that one exec asks for.
    pub request_id: RequestId,
    pub run_id: RunId,
    pub capability: CapabilityName,
    pub audience: AudienceName,
    pub channel: Option<Channel>,
    pub ttl: Option<Span>,
    pub uses: Option<NonZeroU32>,
    pub reason: Option<Reason>,
}

impl Request {
    /// `repo.push@github.com`: how messages and denials call it.
    pub fn asked(&self) -> String {
        format!("{}@{}", self.capability, self.audience)
    }
}

/// Why it is asked for, in the asker's words. Shown on terminals and kept in the trail: at most 500
/// characters, none that controls a terminal or turns the direction of text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reason(String);

/// The text is no reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidReason {
    #[error("the reason is empty; leave it out instead")]
    Empty,
    #[error("the reason is longer than {} characters", Reason::MAX)]
    TooLong,
    #[error("the reason holds a control character at position {at}")]
    Control { at: usize },
}

impl Reason {
    /// Characters.
    pub const MAX: usize = 500;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Reason {
    type Err = InvalidReason;
    fn from_str(text: &str) -> Result<Self, InvalidReason> {
        if text.trim().is_empty() {
            return Err(InvalidReason::Empty);
        }
        if text.chars().count() > Self::MAX {
            return Err(InvalidReason::TooLong);
        }
        // U+2028/9 break lines; the others reorder what a reader of the trail sees (CVE-2021-42574).
        let misleads = |c: char| {
            c.is_control()
                || matches!(c, '\u{200E}' | '\u{200F}' | '\u{061C}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
        };
        match text.chars().position(misleads) {
            Some(i) => Err(InvalidReason::Control { at: i + 1 }),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Reason {
    type Error = InvalidReason;
    fn try_from(text: String) -> Result<Self, InvalidReason> {
        text.parse()
    }
}

impl From<Reason> for String {
    fn from(reason: Reason) -> String {
        reason.0
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `--lease CAPABILITY@AUDIENCE[,channel=C][,ttl=D][,uses=N]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseFlag {
    pub capability: CapabilityName,
    pub audience: AudienceName,
    pub channel: Option<Channel>,
    pub ttl: Option<Span>,
    pub uses: Option<NonZeroU32>,
}

impl LeaseFlag {
    pub fn into_request(
        self,
        request_id: RequestId,
        run_id: RunId,
        reason: Option<Reason>,
    ) -> Request {
        let Self { capability, audience, channel, ttl, uses } = self;
        Request { request_id, run_id, capability, audience, channel, ttl, uses, reason }
    }
}

/// The text is no lease flag; says which part is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLeaseFlag {
    #[error("`{0}` is no lease: expected CAPABILITY@AUDIENCE, as in repo.push@github.com")]
    NoAudience(String),
    #[error("in lease `{flag}`")]
    Name { flag: String, source: InvalidName },
    #[error("in lease `{flag}`: ttl")]
    Ttl { flag: String, source: InvalidQuantity },
    #[error("in lease `{flag}`: `uses={value}` must be a number from 1 to 4294967295")]
    Uses { flag: String, value: String },
    #[error("in lease `{flag}`: `{part}` is no option: there are channel=, ttl=, uses=")]
    Option { flag: String, part: String },
    #[error("in lease `{flag}`: `{key}` is given twice")]
    Twice { flag: String, key: &'static str },
}

impl FromStr for LeaseFlag {
    type Err = InvalidLeaseFlag;
    fn from_str(text: &str) -> Result<Self, InvalidLeaseFlag> {
        let shown = |t: &str| -> String {
            t.chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect()
        };
        let flag = || shown(text);
        let name = |source| InvalidLeaseFlag::Name { flag: flag(), source };
        let mut parts = text.split(',');
        let pair = parts.next().unwrap_or_default();
        let (capability, audience) =
            pair.split_once('@').ok_or_else(|| InvalidLeaseFlag::NoAudience(flag()))?;
        let mut lease = Self {
            capability: capability.parse().map_err(name)?,
            audience: audience.parse().map_err(name)?,
            channel: None,
            ttl: None,
            uses: None,
        };
        for part in parts {
            let option = || InvalidLeaseFlag::Option { flag: flag(), part: shown(part) };
            let (key, value) = part.split_once('=').ok_or_else(option)?;
            let earlier = match key {
                "channel" => lease.channel.replace(value.parse().map_err(name)?).map(|_| "channel"),
                "ttl" => {
                    let ttl = value.parse();
                    let ttl =
                        ttl.map_err(|source| InvalidLeaseFlag::Ttl { flag: flag(), source })?;
                    lease.ttl.replace(ttl).map(|_| "ttl")
                }
                "uses" => {
                    let uses = value.parse().map_err(|_| InvalidLeaseFlag::Uses {
                        flag: flag(),
                        value: shown(value),
                    })?;
                    lease.uses.replace(uses).map(|_| "uses")
                }
                _ => return Err(option()),
            };
            if let Some(key) = earlier {
                return Err(InvalidLeaseFlag::Twice { flag: flag(), key });
            }
        }
        Ok(lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_with_and_without_options() {
        let plain: LeaseFlag = "repo.push@github.com".parse().unwrap();
        assert_eq!((plain.channel, plain.ttl, plain.uses), (None, None, None));
        let full: LeaseFlag =
            "db.read@db.internal:5432,uses=3,ttl=90s,channel=file".parse().unwrap();
        assert_eq!(full.audience.as_str(), "db.internal:5432");
        assert_eq!(full.channel, Some(Channel::File));
        assert_eq!((full.ttl, full.uses.map(NonZeroU32::get)), (Some(Span::seconds(90)), Some(3)));
    }

    #[test]
    fn the_wrong_part_is_named() {
        #[track_caller]
        fn check(text: &str, expected: &str) {
            let e = text.parse::<LeaseFlag>().unwrap_err();
            let source = std::error::Error::source(&e).map(|s| format!(": {s}"));
            let said = format!("{e}{}", source.unwrap_or_default());
            assert!(said.contains(expected), "{text:?}: {said}");
        }
        check("", "CAPABILITY@AUDIENCE");
        check("repo.push", "CAPABILITY@AUDIENCE");
        check("Repo@h", "no capability name");
        check("a@H", "no audience");
        check("a@", "no audience");
        check("a@b@c", "no audience");
        check("a@h,channel=fax", "no channel");
        check("a@h,ttl=soon", "no duration");
        check("a@h,ttl=0", "no duration");
        check("a@h,uses=0", "uses=0");
        check("a@h,uses=-1", "uses=-1");
        check("a@h,uses=x", "uses=x");
        check("a@h,", "no option");
        check("a@h,ttl", "no option");
        check("a@h,tll=1", "`tll=1` is no option");
        check("a@h,ttl=1,ttl=2", "`ttl` is given twice");
        check("a@h\n,ttl=1", "no audience");
    }

    #[test]
    fn reasons_are_bounded_and_plain() {
        for good in ["fix #12", "développer — naïve", &"x".repeat(500)] {
            assert!(good.parse::<Reason>().is_ok(), "{good:?}");
        }
        for bad in ["", "  ", "a\nb", "a\x1b[2J", "a\u{202E}b", "a\u{2028}b", &"x".repeat(501)] {
            assert!(bad.parse::<Reason>().is_err(), "{bad:?}");
        }
    }
}
