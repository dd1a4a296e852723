//! The binary: parse, dispatch, exit. Everything else is in the library.
#![forbid(unsafe_code)]
#![cfg_attr(target_env = "gnu", no_main)]

use sublet::sys::wiping::Wiping;

/// The system's, until a minter asks for more.
#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

#[cfg(target_env = "gnu")]
sublet::sys::start::program!(run);

/// Where std learns its arguments from its own beginning alone.
#[cfg(not(target_env = "gnu"))]
fn main() {
    std::process::exit(run().into());
}

fn run() -> u8 {
    sublet::cli::main(std::env::args_os())
}
