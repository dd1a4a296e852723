//! The privileged process without policy. Forked before any secret is loaded; single-threaded,
//! synchronous; the broker orders, the launcher checks, does and reports.
//!
//! - [`wire`]: the packets between broker and launcher
//! - [`client`]: the broker's side of them
//! - [`serve`]: the launcher's loop
//! - [`exec`]: one exec in the launcher, from plan to scrub
//! - [`compile`]: the plan of one exec, from the profile that the launcher itself reads
//! - [`guard`]: what of sublet's own no exec may see
//! - [`into`]: a running container as the place of an exec
//! - [`surroundings`], [`posture`]: what this host lets a launcher do; what is enforced for an exec, by what
//! - [`explain`]: the plan in words
//! - [`source`]: `file` and `command` sources, opened and run here; [`mint`]: minters, started here
#![forbid(unsafe_code)]

pub mod client;
pub mod compile;
pub mod exec;
pub mod explain;
pub mod guard;
pub mod into;
pub mod mint;
pub mod posture;
pub mod serve;
pub mod source;
pub mod surroundings;
pub mod wire;
