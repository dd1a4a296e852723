//! Placing a value where only one exec can reach it, and wiping it there.
//!
//! - [`aws_endpoint`]: the address at which one exec asks for an AWS credential
//! - [`container`]: memfds and tmpfs files, made and wiped by the launcher
//! - [`fill`]: the broker's side: writes the value once, keeps a mapping to wipe through
//! - [`git`]: the credential socket of one exec
//! - [`helper`]: `sublet git-credential`, the other end of that socket
//! - [`ssh`]: the ssh-agent socket of one exec
#![forbid(unsafe_code)]

pub mod aws_endpoint;
pub mod container;
pub mod fill;
pub mod git;
pub mod helper;
pub mod ssh;
