//! The binary: parse, dispatch, exit. Everything else is in the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(sublet::cli::main(std::env::args_os()))
}
