//! Memory that other processes see, wiped before it is given back; and what a process says about its own.
//! That of values which none other sees is in `locked`.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags};
use zeroize::Zeroize;

/// A writable shared mapping of a delivery (a memfd or a tmpfs file). Writes are seen by every holder,
/// so zeroing it is the revocation. It is not inherited by children and not dumped.
pub struct SharedMapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value; other processes may read the same pages, and are given
// only bytes, never references. Within this process access follows `&self`/`&mut self`.
unsafe impl Send for SharedMapping {}

impl SharedMapping {
    /// Maps the first `len` bytes of `file` and locks them.
    ///
    /// The file must not be truncated below `len` while the mapping lives: the caller seals memfds with
    /// `F_SEAL_SHRINK` and gives tmpfs files only to holders of a read-only mount.
    pub fn new(file: impl AsFd, len: usize) -> io::Result<Self> {
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = map_shared(file, len)?;
        let mapping =
            Self { start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?, len };
        keep_to_this_process(start, len)?;
        // SAFETY: the range is exactly the live mapping made above.
        unsafe { rustix::mm::mlock_with(start, len, MlockFlags::empty()) }?;
        Ok(mapping)
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: a live mapping of `len` bytes; `&mut self` makes this the only reference in this
        // process. Another holder of the writable descriptor can change the bytes while we look: they
        // are plain bytes, on which no invariant of ours rests.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: as in `bytes_mut`, shared.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// Writes zeros that the compiler may not drop; every holder reads zeros afterwards.
    pub fn wipe(&mut self) {
        self.bytes_mut().zeroize();
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        self.wipe();
        // SAFETY: the mapping was made by this type, is unmapped once, and no reference outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Maps the first `len` bytes of a file, writable and shared.
pub(super) fn map_shared(file: impl AsFd, len: usize) -> io::Result<*mut c_void> {
    let (access, null) = (ProtFlags::READ | ProtFlags::WRITE, std::ptr::null_mut());
    // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing of ours.
    Ok(unsafe { rustix::mm::mmap(null, len, access, MapFlags::SHARED, file.as_fd(), 0) }?)
}

pub(super) fn keep_to_this_process(start: *mut c_void, len: usize) -> io::Result<()> {
    // SAFETY: both advices change only what fork and core dumps do with this live range of ours
    // (madvise(2)); they do not touch its contents.
    unsafe {
        rustix::mm::madvise(start, len, Advice::LinuxDontFork)?;
        rustix::mm::madvise(start, len, Advice::LinuxDontDump)?;
    }
    Ok(())
}

/// Whether this process may dump core, and who owns its /proc entries: undumpable, only root may look
/// (prctl(2), proc(5)).
pub fn set_dumpable(dumpable: bool) -> io::Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    let behavior =
        if dumpable { DumpableBehavior::Dumpable } else { DumpableBehavior::NotDumpable };
    set_dumpable_behavior(behavior)?;
    Ok(())
}

/// Sets the soft and hard limit for core files to nothing. getrlimit(2).
pub fn forbid_core_dumps() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(())
}

/// The number behind a descriptor, for messages.
pub fn fd_number(fd: impl AsFd) -> i32 {
    fd.as_fd().as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wipe_of_the_mapping_is_seen_through_the_file() {
        use std::os::unix::fs::FileExt;
        let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 6).unwrap();
        let mut mapping = SharedMapping::new(&fd, 6).unwrap();
        mapping.bytes_mut().copy_from_slice(b"secret");
        let file = std::fs::File::from(fd);
        let mut seen = [0; 6];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"secret");
        mapping.wipe();
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [0; 6]);
    }
}
