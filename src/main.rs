//! The binary: parse, dispatch, exit. Everything else is in the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use sublet::sys::wiping::Wiping;

/// The system's, until a minter asks for more.
#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

fn main() -> ExitCode {
    ExitCode::from(sublet::cli::main(std::env::args_os()))
}
