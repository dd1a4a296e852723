//! Where the program begins: at C's `main`, not behind std's own beginning, which reads `/proc/self/maps` for the
//! bounds of a stack whose overflow it would only name: a tenth of a millisecond at each of the starts that an
//! exec is made of. What of it protects something is done here.

use std::panic::catch_unwind;

/// What std gives a program that panics.
const PANICKED: i32 = 101;

/// Defines the program's `main`, which gives its status.
#[doc(hidden)]
#[macro_export]
macro_rules! program_of {
    ($main:path) => {
        // SAFETY: no_mangle asks that nothing else bears the name. C's `main` is the program's alone to define, and
        // std defines none where a crate is `no_main`. The start files call it once, with arguments that a
        // function of the C ABI may leave where they are.
        #[unsafe(no_mangle)]
        extern "C" fn main() -> core::ffi::c_int {
            $crate::sys::start::begin($main)
        }
    };
}

#[doc(inline)]
pub use program_of as program;

/// Runs a program, as the first thing of its process.
pub fn begin(main: fn() -> u8) -> i32 {
    open_closed_streams();
    ignore_signals_of_writes();
    let status = catch_unwind(main).map_or(PANICKED, i32::from);
    // Writes out what std holds back.
    std::process::exit(status)
}

/// A standard stream that is closed is opened on `/dev/null`: else the next file, perhaps the state, would bear its
/// number, and take what is written for people. F_GETFD in fcntl(2), "EBADF".
fn open_closed_streams() {
    for stream in 0..3 {
        // SAFETY: F_GETFD takes no argument, changes nothing, and fails for what is not open.
        if unsafe { libc::fcntl(stream, libc::F_GETFD) } >= 0 {
            continue;
        }
        // The lowest number that is free: this one.
        // SAFETY: open reads a path that ends with a NUL byte, and takes no mode without O_CREAT.
        if unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) } != stream {
            std::process::abort();
        }
    }
}

/// A write to a closed pipe is an error, as std has it, and so is one past RLIMIT_FSIZE: neither is the end. What is
/// started gets the default actions again (`process::reset_signals`). setrlimit(2).
fn ignore_signals_of_writes() {
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: signal with SIG_IGN installs no function that could run. It fails for no signal that exists.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
