//! The kernel: one file per kernel concept, thin and safe to call. The only room with `unsafe`.
//! Functions return `std::io::Error` or `rustix::io::Errno`; callers add what it was for.
#![allow(unsafe_code)]

pub mod clock;
pub mod memory;
pub mod probe;
