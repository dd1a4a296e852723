//! Passing a command's streams on: bytes in, masked bytes out, nothing lost, no one waited for.
//!
//! - [`output`]: from the command to our own standard output or error
//! - [`input`]: from our standard input to the command
//! - [`connection`], [`frames`]: the stream of an exec of the broker
//! - [`terminal`]: our own terminal in raw mode, and its size
//! - `queue`: bytes that wait to be written, and are wiped where they may hold a value
//! - `room`: how much a read is given
#![forbid(unsafe_code)]

/// The signals of a caller that go to the command. SIGWINCH is for the terminal's size.
pub const FORWARDED: [i32; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

pub mod connection;
pub mod frames;
pub mod input;
pub mod output;
mod queue;
mod room;
pub mod terminal;
