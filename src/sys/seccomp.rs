//! Installing a system-call filter. seccomp(2); Linux 3.17.

use std::io;

/// Bytes of `struct clone_args` in its first version: anything smaller is `EINVAL`, before any look
/// at it. clone(2).
const TOO_SMALL: libc::size_t = 0;

/// Puts `program` on the calling thread, for good, and on all that it starts. It needs no_new_privs or
/// `CAP_SYS_ADMIN` in the user namespace; unlike seccompiler's own function it sets neither. Allocates
/// nothing and takes no lock, so it may stand between clone and exec.
///
/// No flags: TSYNC is for other threads, of which there are none after a clone, and SPEC_ALLOW would
/// give up the mitigation that kernels before 5.16 tie to a filter.
///
/// # Errors
/// `EINVAL` for a program that is empty or longer than 4096 instructions (nothing is installed then),
/// or that the kernel finds faulty; `EACCES` without no_new_privs; `ENOMEM` if all filters together
/// pass 32768 instructions.
pub fn install(program: &[libc::sock_filter]) -> io::Result<()> {
    let len = match u16::try_from(program.len()) {
        Ok(len @ 1..=4096) => len,
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: seccomp(2) reads `len` instructions behind `filter` and writes nothing; both describe the
    // caller's slice, which outlives the call. `cast_mut` is for the C type only.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER),
            0 as libc::c_long,
            &raw const program,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Tries a call that every built-in filter refuses, in a form that does nothing where it is allowed:
/// clone3(2) with a structure of no size. Allocates nothing.
///
/// # Errors
/// `ENOTRECOVERABLE` if the call got past the filter, so that the caller can stop.
pub fn see_it_refused() -> io::Result<()> {
    // SAFETY: with size 0 the kernel answers EINVAL before it reads the null pointer.
    let rc =
        unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<libc::c_void>(), TOO_SMALL) };
    let refused = matches!(
        io::Error::last_os_error().raw_os_error(),
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES)
    );
    if rc == -1 && refused {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOTRECOVERABLE))
    }
}
