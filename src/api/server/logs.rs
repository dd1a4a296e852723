//! Where traces go: standard error, one line each, as text or JSON. Spans carry ids; bodies and values are
//! never traced.
//!
//! What clients can cause at will is traced at `debug`: a full pipe behind standard error must not hold up
//! the service.
#![forbid(unsafe_code)]

use std::io;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// Traces cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    #[error("RUST_LOG is no filter")]
    Filter(#[source] tracing_subscriber::filter::FromEnvError),
    #[error("traces go somewhere already")]
    Taken(#[source] TryInitError),
}

/// Sends traces to standard error. `RUST_LOG` says which, as tracing-subscriber's `EnvFilter` reads it;
/// without it `verbosity` does (how often `-v` was given): 0 `info`, 1 `debug`, else `trace`, of this
/// program alone. Once in a process.
///
/// # Errors
/// [`LogsError`]; nothing has changed.
pub fn init_tracing(verbosity: u8, json: bool) -> Result<(), LogsError> {
    let filter = match std::env::var_os("RUST_LOG") {
        Some(_) => EnvFilter::try_from_default_env().map_err(LogsError::Filter)?,
        None => EnvFilter::new(match verbosity {
            0 => "sublet=info",
            1 => "sublet=debug",
            _ => "sublet=trace",
        }),
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    if json { lines.json().finish().try_init() } else { lines.with_ansi(false).finish().try_init() }
        .map_err(LogsError::Taken)
}
