//! Who authorises: the invoking user.
//!
//! Reads /etc/passwd itself: a static binary has no name service switch, and a network directory is no
//! place to wait in on the way to an exec.
#![forbid(unsafe_code)]

use std::sync::OnceLock;

use crate::model::name::IdentityName;

/// The invoking user's name, else `uid:N`. `SUDO_USER` counts only when the real uid is 0: anyone else
/// could set it to any name.
pub fn invoking_user() -> IdentityName {
    // Asked first while the process is still the invoker's: on a broker's state root becomes its user.
    static INVOKER: OnceLock<IdentityName> = OnceLock::new();
    INVOKER.get_or_init(look_up).clone()
}

fn look_up() -> IdentityName {
    let uid = rustix::process::getuid();
    let sudo_user = if uid.is_root() { std::env::var("SUDO_USER").ok() } else { None };
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    named(uid.as_raw(), sudo_user.as_deref(), &users)
}

fn named(uid: u32, sudo_user: Option<&str>, users: &str) -> IdentityName {
    let known = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(name)
    });
    sudo_user
        .into_iter()
        .chain(known)
        .find_map(|name| name.parse().ok())
        .unwrap_or_else(|| numbered(uid))
}

fn numbered(uid: u32) -> IdentityName {
    format!("uid:{uid}").parse().expect("a number has no spaces and few digits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_named_by_sudo_then_by_the_users_file_then_by_number() {
        #[track_caller]
        fn check(uid: u32, sudo_user: Option<&str>, name: &str) {
            let users =
                "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\nbad\n";
            assert_eq!(named(uid, sudo_user, users).as_str(), name);
        }
        check(0, None, "root");
        check(0, Some("alice"), "alice");
        check(0, Some("al ice"), "root");
        check(0, Some(""), "root");
        check(1000, None, "alice");
        check(1001, None, "uid:1001");
    }
}
