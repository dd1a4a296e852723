//! The broker's interface: HTTP/1.1 with JSON on Unix sockets.
//!
//! - [`wire`]: the bodies, the same for both sides
//! - [`client`]: a small blocking client
#![forbid(unsafe_code)]

pub mod client;
pub mod wire;
