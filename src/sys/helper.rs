//! A process that only stands in a namespace, so that its parent can open it. clone(2).
//!
//! It shares the launcher's memory, as vfork's child does, but beside it: a copy of the page tables would
//! cost more than all that it does. It shares its descriptors too: those of a thousand execs would take longer
//! to copy and to close than the rest of an exec. It calls the kernel directly, touches nothing but its own
//! small stack, and ends when its pipe does, or with the launcher.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::process;

/// Two system calls deep.
const STACK: usize = 16 << 10;

pub struct Helper {
    pid: i32,
    /// Closed, it is the helper's end.
    pipe: Option<io::PipeWriter>,
    /// In use until the helper is reaped.
    _stack: Vec<u8>,
    _reader: OwnedFd,
}

/// What the helper is told, on its own stack.
#[derive(Clone, Copy)]
struct Ends {
    reader: i32,
    parent: i32,
}

extern "C" fn stand(ends: *mut c_void) -> i32 {
    // SAFETY: `start` passes an `Ends` at the top of this child's own stack, which nobody else touches.
    let Ends { reader, parent } = unsafe { *ends.cast::<Ends>() };
    let mut watched = libc::pollfd { fd: reader, events: libc::POLLIN, revents: 0 };
    let pause = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    // SAFETY: raw system calls on a descriptor that stays open until this process is reaped, and on its own
    // stack. Not through the C library, whose errno is the launcher's: memory and thread area are shared.
    unsafe {
        let (option, kill) = (libc::PR_SET_PDEATHSIG as usize, libc::SIGKILL as usize);
        raw_syscall(libc::SYS_prctl, [option, kill, 0, 0, 0]);
        // The signal may be late, or kept from us: its table would keep the launcher's descriptors open.
        while raw_syscall(libc::SYS_getppid, [0; 5]) == parent as isize {
            let (watched, timeout) = (&raw mut watched as usize, &raw const pause as usize);
            let ready = raw_syscall(libc::SYS_ppoll, [watched, 1, timeout, 0, 0]);
            if ready != 0 && ready != -(libc::EINTR as isize) {
                break;
            }
        }
        raw_syscall(libc::SYS_exit_group, [0; 5]);
    }
    0
}

/// A system call that leaves errno alone.
///
/// # Safety
/// As the call itself asks.
unsafe fn raw_syscall(number: libc::c_long, [a, b, c, d, e]: [usize; 5]) -> isize {
    let result: isize;
    // SAFETY: the x86-64 convention (syscall(2)): rcx and r11 are lost, the result is in rax.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

impl Helper {
    /// Starts one in new namespaces (`CLONE_NEW*`).
    pub fn start(namespaces: libc::c_int) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let reader: OwnedFd = reader.into();
        let mut stack = vec![0_u8; STACK];
        let ends = Ends { reader: reader.as_raw_fd(), parent: std::process::id() as i32 };
        let flags = libc::CLONE_VM | libc::CLONE_FILES | namespaces | libc::SIGCHLD;
        // SAFETY: the argument is written into the stack's upper end, 16-byte aligned and inside of it; the
        // child's stack begins below. Both live in `stack`, which is freed only after the child is reaped
        // (`drop`). `stand` touches nothing else of the shared memory, so that the launcher may go on.
        let pid = unsafe {
            let top = stack.as_mut_ptr().add(STACK - size_of::<Ends>());
            let top = (top as usize & !15) as *mut c_void;
            top.cast::<Ends>().write(ends);
            libc::clone(stand, top, flags, top)
        };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { pid, pipe: Some(writer), _stack: stack, _reader: reader })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Lets it end.
    pub fn dismiss(&mut self) {
        self.pipe = None;
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.dismiss();
        // Its stack is freed next: it must be gone.
        if let Err(e) = process::wait_for(self.pid) {
            eprintln!("sublet: could not reap a helper: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_stands_in_a_namespace_of_its_own_until_it_is_dropped() {
        let helper = Helper::start(libc::CLONE_NEWUSER).unwrap();
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
        let pid = helper.pid();
        assert_ne!(of(&pid.to_string()), of("self"));
        drop(helper);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
