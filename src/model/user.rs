//! Who a command is in a container, by number: `1000`, `1000:100`. Names are the image's, and not taken at
//! their word.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerUser {
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected UID or UID:GID, in numbers below 4294967295; without a GID it is the UID's number"
)]
pub struct InvalidUser;

impl FromStr for ContainerUser {
    type Err = InvalidUser;

    fn from_str(text: &str) -> Result<Self, InvalidUser> {
        let (uid, gid) = text.split_once(':').unwrap_or((text, text));
        let id = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            // The last one means none: chown(2).
            let id = text.parse().ok().filter(|id| digits && *id != u32::MAX);
            id.ok_or(InvalidUser)
        };
        Ok(Self { uid: id(uid)?, gid: id(gid)? })
    }
}

impl TryFrom<String> for ContainerUser {
    type Error = InvalidUser;
    fn try_from(text: String) -> Result<Self, InvalidUser> {
        text.parse()
    }
}

impl From<ContainerUser> for String {
    fn from(user: ContainerUser) -> String {
        user.to_string()
    }
}

impl fmt::Display for ContainerUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_alone_are_a_user() {
        #[track_caller]
        fn check(text: &str, expected: Option<(u32, u32)>) {
            let found = text.parse::<ContainerUser>().ok().map(|u| (u.uid, u.gid));
            assert_eq!(found, expected, "{text}");
        }
        check("1000", Some((1000, 1000)));
        check("0:5", Some((0, 5)));
        for wrong in ["", "root", "1:", ":1", "-1", "+1", "1:2:3", "4294967295", " 1"] {
            check(wrong, None);
        }
    }
}
