//! The kernel: one file per kernel concept, thin and safe to call. The only room with `unsafe`.
//! Functions return `std::io::Error` or `rustix::io::Errno`; callers add what it was for.
//!
//! What runs between clone and exec (`child`-side functions) neither allocates, locks nor panics; each
//! such function says so.
#![allow(unsafe_code)]

pub mod clock;
pub mod cpu;
pub mod exec;
pub mod helper;
pub mod ids;
pub mod landlock;
pub mod lend;
pub mod locked;
pub mod memory;
pub mod mount;
pub mod net;
pub mod probe;
pub mod process;
pub mod random;
pub mod seccomp;
pub mod slate;
pub mod slice;
pub mod socket;
pub mod start;
pub mod wiping;
