//! Random numbers of the kernel's. getrandom(2), Linux 3.17.

use std::io;

/// Straight to the kernel: the crate of that name first looks for the function by its name, which in a
/// process that has just begun costs more than all the rest of an answer.
pub fn random_u32() -> io::Result<u32> {
    let mut bytes = [0; 4];
    loop {
        // SAFETY: the call writes at most the four bytes of the buffer that it is told of.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match got {
            4 => return Ok(u32::from_ne_bytes(bytes)),
            -1 if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted => {
                return Err(io::Error::last_os_error());
            }
            // Interrupted, or less: ask again.
            _ => {}
        }
    }
}
