//! The binary: parse, dispatch, exit. Everything else is in the library.
#![forbid(unsafe_code)]
#![no_main]

use sublet::sys::wiping::Wiping;

/// The system's, until a minter asks for more.
#[global_allocator]
static ALLOCATOR: Wiping = Wiping;

sublet::sys::start::program!(run);

fn run() -> u8 {
    sublet::cli::main(std::env::args_os())
}
