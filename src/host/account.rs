//! Who the broker is: `[host] user`, by name or number, or the last uid of the pool.
//!
//! Reads `/etc/passwd` itself. The C library's look-up would load modules and ask services in the process
//! that holds root's rights, and a static binary has none of them.
#![forbid(unsafe_code)]

use std::io;

use serde::Serialize;

use crate::config;

const PASSWD: &str = "/etc/passwd";

/// A user as the kernel knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    pub uid: u32,
    pub gid: u32,
    pub from: AccountFrom,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccountFrom {
    /// `[host] user`.
    Configuration,
    /// The last uid of `[host] uid_pool`.
    Pool,
    /// Whoever started it.
    Caller,
}

#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    #[error("could not read {PASSWD}")]
    Passwd(#[source] io::Error),
    #[error(
        "[host] user names `{name}`, and {PASSWD} has no such user; make it with useradd --system"
    )]
    Unknown { name: String },
    #[error("[host] user names `{name}`, which is {what}; name a user that does nothing else")]
    Unsuitable { name: String, what: &'static str },
}

impl Account {
    /// Whoever runs this process.
    pub fn of_caller() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            from: AccountFrom::Caller,
        }
    }
}

pub(super) fn of_broker(host: &config::Host) -> Result<Account, AccountError> {
    let Some(name) = &host.user else {
        let uid = host.uid_pool.broker_uid();
        return Ok(Account { uid, gid: uid, from: AccountFrom::Pool });
    };
    let passwd = std::fs::read(PASSWD).map_err(AccountError::Passwd)?;
    let account =
        find(name, &passwd).ok_or_else(|| AccountError::Unknown { name: name.clone() })?;
    let unsuitable = |what| AccountError::Unsuitable { name: name.clone(), what };
    let pool = host.uid_pool;
    match account {
        Account { uid: 0, .. } => Err(unsuitable("root")),
        Account { gid: 0, .. } => Err(unsuitable("of root's group")),
        Account { uid: 65_534 | u32::MAX, .. } => Err(unsuitable("nobody in particular")),
        Account { uid, .. } if pool.contains(uid) && uid != pool.broker_uid() => {
            Err(unsuitable("a uid that [host] uid_pool gives to execs"))
        }
        account => Ok(account),
    }
}

/// A number is a uid whether it is listed or not, as for chown(1); its group is the listed one, else the
/// one of the same number. Lines that are none of passwd(5) are passed over.
fn find(name: &str, passwd: &[u8]) -> Option<Account> {
    let from = AccountFrom::Configuration;
    let number = name.parse::<u32>().ok().filter(|_| name.bytes().all(|b| b.is_ascii_digit()));
    let listed = passwd.split(|&b| b == b'\n').find_map(|line| {
        let fields: Vec<&str> = std::str::from_utf8(line).ok()?.split(':').collect();
        let [login, _, uid, gid, _, _, _] = fields[..] else { return None };
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        let is_it = number.map_or(login == name, |number| number == uid);
        is_it.then_some(Account { uid, gid, from })
    });
    listed.or(number.map(|uid| Account { uid, gid: uid, from }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD_TEXT: &[u8] = b"root:x:0:0:root:/root:/bin/bash
broken:x:12
sublet:x:998:997::/var/lib/sublet:/usr/sbin/nologin
\xff:x:5:5:::
sublet:x:1:1:a second one:/:/bin/sh
grouped:x:996:0::/:
";

    #[test]
    fn a_user_is_found_by_name_or_number() {
        #[track_caller]
        fn check(name: &str, expected: Option<(u32, u32)>) {
            assert_eq!(find(name, PASSWD_TEXT).map(|a| (a.uid, a.gid)), expected, "{name}");
        }
        check("sublet", Some((998, 997)));
        check("998", Some((998, 997)));
        check("4000", Some((4000, 4000)));
        check("broken", None);
        check("x", None);
        check("", None);
        check("+4000", None);
        check("4294967296", None);
    }

    #[test]
    fn without_a_name_it_is_the_pools_last_and_with_one_never_roots_or_an_execs() {
        let host = |user: Option<&str>| config::Host {
            user: user.map(str::to_owned),
            uid_pool: "5000:10".parse().unwrap(),
            ..config::Host::default()
        };
        let last = of_broker(&host(None)).unwrap();
        assert_eq!((last.uid, last.gid, last.from), (5009, 5009, AccountFrom::Pool));
        assert_eq!(of_broker(&host(Some("5009"))).unwrap().uid, 5009);
        assert_eq!(of_broker(&host(Some("4999"))).unwrap().uid, 4999);
        for unsuitable in ["0", "5000", "5008", "65534", "4294967295"] {
            let refused = of_broker(&host(Some(unsuitable)));
            assert!(matches!(refused, Err(AccountError::Unsuitable { .. })), "{unsuitable}");
        }
        let unknown = of_broker(&host(Some("no-such-user")));
        assert!(matches!(unknown, Err(AccountError::Unknown { .. })));
    }
}
