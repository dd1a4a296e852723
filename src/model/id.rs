//! Identifiers: a prefix that says what it names, and a UUIDv7 (RFC 9562 §5.7), so that they sort by
//! time. A run's id may also be the host's own word for its run.
#![forbid(unsafe_code)]

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The text is no id of this kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {kind} id: {expected}")]
pub struct InvalidId {
    kind: &'static str,
    text: String,
    expected: &'static str,
}

/// Milliseconds, 12 bits of the next fraction (RFC 9562 §6.2, method 3), the rest random.
fn fresh_uuid() -> uuid::Uuid {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut rest = [0; 10];
    crate::sys::random::fill(&mut rest).expect("getrandom(2) is there since Linux 3.17");
    let fraction = (now.subsec_nanos() % 1_000_000) * 4096 / 1_000_000;
    rest[..2].copy_from_slice(&(fraction as u16).to_be_bytes());
    uuid::Builder::from_unix_timestamp_millis(now.as_millis() as u64, &rest).into_uuid()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub const PREFIX: &'static str = $prefix;

            /// A fresh id: the wall clock to a quarter of a microsecond, and 62 random bits.
            pub fn fresh() -> Self {
                Self(format!(concat!($prefix, "{}"), fresh_uuid().simple()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

macro_rules! generated_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal) => {
        id!($(#[$doc])* $name, $kind, $prefix);

        impl std::str::FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let is_id = text.strip_prefix($prefix).is_some_and(|rest| {
                    rest.len() == 32 && rest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                });
                if is_id {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(InvalidId {
                        kind: $kind,
                        text: text.to_owned(),
                        expected: concat!("`", $prefix, "` and 32 hexadecimal digits"),
                    })
                }
            }
        }
    };
}

id!(
    /// One agent run. Made by sublet (`run_…`) or given by the host.
    RunId,
    "run",
    "run_"
);
generated_id!(
    /// A granted permission. Knowing it is no authority.
    LeaseId,
    "lease",
    "lse_"
);
generated_id!(
    /// One command under zero or more leases.
    ExecId,
    "exec",
    "exe_"
);
generated_id!(
    /// One value that another party minted for a lease.
    MintId,
    "mint",
    "mnt_"
);
generated_id!(
    /// One line of the audit trail.
    EventId,
    "event",
    "evt_"
);
generated_id!(
    /// One request for a lease, or for several together: joins its verdicts and its exec in the trail.
    RequestId,
    "request",
    "req_"
);

impl std::str::FromStr for RunId {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if !text.is_empty()
            && text.len() <= 64
            && text.bytes().all(plain)
            && text.as_bytes()[0].is_ascii_alphanumeric()
        {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId {
                kind: "run",
                text: text.to_owned(),
                expected: "1 to 64 letters, digits, `_`, `-` or `.`, first a letter or digit",
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_id_parses_as_its_own_kind_and_no_other() {
        let lease = LeaseId::fresh();
        assert_eq!(lease.as_str().parse::<LeaseId>().as_ref(), Ok(&lease));
        assert!(lease.as_str().parse::<ExecId>().is_err());
    }

    #[test]
    fn a_run_may_carry_the_hosts_own_name() {
        assert!("ci-1234.5".parse::<RunId>().is_ok());
        for bad in ["", "-x", "a b", "a/b", "a\n", &"x".repeat(65)] {
            assert!(bad.parse::<RunId>().is_err(), "{bad:?}");
        }
    }
}
