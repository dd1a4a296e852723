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
    ignore_sigpipe();
    let status = catch_unwind(main).map_or(PANICKED, i32::from);
    // Writes out what std holds back.
    std::process::exit(status)
}

/// A standard stream that is closed is opened on `/dev/null`: else the next file, perhaps the state, would bear its
/// number, and take what is written for people. poll(2), POLLNVAL.
fn open_closed_streams() {
    let mut streams = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: poll reads and writes as many pollfd structures as it is told of, which `streams` has, and waits for
    // nothing.
    while unsafe { libc::poll(streams.as_mut_ptr(), streams.len() as libc::nfds_t, 0) } < 0 {
        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            std::process::abort();
        }
    }
    for _ in streams.iter().filter(|stream| stream.revents & libc::POLLNVAL != 0) {
        // The lowest number that is free, which is that of the first such stream.
        // SAFETY: open reads a path that ends with a NUL byte, and takes no mode without O_CREAT.
        if unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) } < 0 {
            std::process::abort();
        }
    }
}

/// As std does: a write to a closed pipe is an error, not the end.
fn ignore_sigpipe() {
    // SAFETY: signal with SIG_IGN installs no function that could run. It fails for no signal that exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
