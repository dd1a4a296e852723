//! How much of a resource this process may use. getrlimit(2).
#![forbid(unsafe_code)]

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Bytes that one may lock who was root, whom no limit bound: a thousand execs with some pages each, and
/// the largest values.
pub const LOCKED_MEMORY: u64 = 256 << 20;

/// Raises the hard limit to `least` where that is permitted, and the soft limit to the hard one.
///
/// # Errors
/// Of setrlimit(2), but not that the hard limit may not be raised.
pub fn raise(resource: Resource, least: u64) -> io::Result<()> {
    // Nothing is no limit at all.
    let Some(hard) = getrlimit(resource).maximum else {
        return Ok(setrlimit(resource, Rlimit { current: None, maximum: None })?);
    };
    let wanted = Some(hard.max(least));
    match setrlimit(resource, Rlimit { current: wanted, maximum: wanted }) {
        Err(rustix::io::Errno::PERM) => {
            Ok(setrlimit(resource, Rlimit { current: Some(hard), maximum: Some(hard) })?)
        }
        other => Ok(other?),
    }
}
