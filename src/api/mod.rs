//! The broker's interface: HTTP/1.1 with JSON on Unix sockets.
//!
//! - [`wire`]: the bodies, the same for both sides
//! - [`object`]: a JSON object, of which the bodies that come in are made
//! - [`client`]: a small blocking client
//! - [`peer`]: who is at the other end of a socket
//! - [`server`]: answers on the control socket and on the runs' sockets
#![forbid(unsafe_code)]

pub mod client;
pub mod object;
pub mod peer;
pub mod server;
pub mod wire;
