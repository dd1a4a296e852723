//! `sublet`: one command, in a sandbox, with the use of a credential for exactly that long.
//!
//! The rooms, and who may import whom, are in `docs/ARCHITECTURE.md`; `tests/imports.rs` holds the rule.
//! Flow and imports go one way, down: edges (`cli`) → the story (`run`) → effects → pure rooms →
//! `model` → `sys`. `sys` is the only place for `unsafe`.
//!
//! What a user writes is parsed once, at the edge, into types that cannot be wrong:
//!
//! ```
//! use sublet::policy::LeaseFlag;
//!
//! let lease: LeaseFlag = "repo.push@github.com,channel=git,ttl=5m".parse()?;
//! assert_eq!(lease.audience.as_str(), "github.com");
//! assert!("repo.push@GitHub.com".parse::<LeaseFlag>().is_err(), "hosts are lower case");
//! # Ok::<(), sublet::policy::request::InvalidLeaseFlag>(())
//! ```
#![deny(unsafe_code)]

pub mod api;
pub mod audit;
pub mod broker;
pub mod cli;
pub mod config;
pub mod delivery;
pub mod doctor;
pub mod envelope;
pub mod guard;
pub mod hook;
pub mod host;
pub mod identity;
pub mod launcher;
pub mod lease;
pub mod minter;
pub mod model;
pub mod policy;
pub mod profile;
pub mod redact;
pub mod relay;
pub mod run;
pub mod sandbox;
pub mod source;
pub mod store;
pub mod sys;
