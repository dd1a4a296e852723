//! What holds the command in.
pub mod seccomp;
