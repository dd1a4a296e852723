//! Starting a program: execve(2) with vectors that were laid out before the clone, and values that it
//! copies from a mapping.

use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use rustix::io::Errno;

use super::process::last_errno;

/// A null-terminated vector of C strings, as execve wants it.
pub struct StringVector {
    /// Keeps the strings alive that `pointers` names.
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers name heap strings owned by this value; nothing is mutated through them.
unsafe impl Send for StringVector {}

impl StringVector {
    pub fn new(strings: Vec<CString>) -> Self {
        let mut pointers = Vec::with_capacity(strings.len() + 1);
        pointers.extend(strings.iter().map(|s| s.as_ptr()));
        pointers.push(ptr::null());
        Self { _strings: strings, pointers }
    }
}

/// Replaces this process's image. Returns only on failure. Child-side.
pub fn execve(program: &CStr, argv: &StringVector, envp: &StringVector) -> Errno {
    // SAFETY: all three are null-terminated (CStr; StringVector ends in a null pointer) and live.
    unsafe {
        libc::execve(program.as_ptr(), argv.pointers.as_ptr(), envp.pointers.as_ptr());
    }
    last_errno()
}

/// The same with a program that was opened before, whatever its path leads to by now: execveat(2),
/// Linux 3.19. Not for scripts: the interpreter could not open a descriptor that is closed on exec.
pub fn execute(program: impl AsFd, argv: &StringVector, envp: &StringVector) -> Errno {
    // SAFETY: the path is an empty C string and both vectors end in a null pointer; all live across the
    // call, which returns only on failure.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_fd().as_raw_fd(),
            c"".as_ptr(),
            argv.pointers.as_ptr(),
            envp.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    last_errno()
}

/// A delivery mapped for reading, from which execve copies: the only place of the value in the child.
pub struct ReadMapping {
    start: *mut libc::c_void,
    len: usize,
}

impl ReadMapping {
    /// Maps `len` bytes of `fd`. Child-side: does not allocate.
    pub fn new(fd: impl AsFd, len: usize) -> Result<Self, Errno> {
        // SAFETY: a fresh shared read-only mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED,
                fd.as_fd(),
                0,
            )
        }?;
        Ok(Self { start, len })
    }

    /// The C strings that the delivery holds, one after the other. Child-side: does not allocate.
    ///
    /// # Errors
    /// `INVAL` if its last byte is no NUL.
    pub fn c_strings(&self) -> Result<impl Iterator<Item = &CStr>, Errno> {
        // SAFETY: a live mapping of `len` bytes, sealed against truncation by the launcher. A wipe can
        // zero the bytes at any time: they stay valid bytes, and the scan below is bounded by `len`.
        let bytes = unsafe { std::slice::from_raw_parts(self.start.cast::<u8>(), self.len) };
        if bytes.last() != Some(&0) {
            return Err(Errno::INVAL);
        }
        let strings = bytes.split_inclusive(|b| *b == 0);
        Ok(strings.filter_map(|string| CStr::from_bytes_with_nul(string).ok()))
    }
}

impl Drop for ReadMapping {
    fn drop(&mut self) {
        // SAFETY: made by this type, unmapped once; `c_str` borrows from `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start, self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
