//! Namespaces, mounts, landlock, seccomp, limits: everything around the command.
//!
//! - [`layout`]: what the command will see, as data (pure)
//! - [`root`]: interprets the layout into detached mounts, in the launcher
//! - [`identity`]: which uid the exec gets, and the user namespaces for it
//! - [`landlock`], [`seccomp`], [`cgroup`]: the other mechanisms, prepared in the launcher
//! - [`plan`]: everything the child needs, ready before the clone
//! - [`child`]: applies the plan between clone and exec, in one fixed order
//! - [`command`]: the command's process, until it executes
//! - [`init`]: PID 1 of the exec
//! - [`step`]: what crosses the socket between the child and the launcher
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod child;
mod command;
pub mod ground;
pub mod identity;
pub mod init;
pub mod landlock;
pub mod layout;
pub mod plan;
pub mod root;
pub mod seccomp;
pub mod step;
