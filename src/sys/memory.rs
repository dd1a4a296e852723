//! Memory for values: locked, out of core dumps and forks, wiped before it is given back.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags};
use zeroize::Zeroize;

/// A private, page-aligned region that never reaches swap, a core dump or a child.
///
/// From memfd_secret(2) where the kernel has it (its pages leave the kernel's own direct map);
/// else anonymous memory with mlock2(2), `MADV_DONTDUMP` and `MADV_DONTFORK`.
pub struct LockedRegion {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the region is plain memory owned by this value alone; `&self` gives only `&[u8]`, so moving
// it between threads or sharing references to it follows the ordinary borrow rules.
unsafe impl Send for LockedRegion {}
// SAFETY: as above: no interior mutability.
unsafe impl Sync for LockedRegion {}

impl LockedRegion {
    /// At least `size` zeroed bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// `EAGAIN` or `ENOMEM` if `RLIMIT_MEMLOCK` is exhausted (getrlimit(2)).
    pub fn new(size: usize) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let len = size.max(1).checked_next_multiple_of(page).ok_or(io::ErrorKind::OutOfMemory)?;
        match Self::secret_memory(len) {
            Ok(region) => Ok(region),
            Err(_) => Self::anonymous(len),
        }
    }

    fn secret_memory(len: usize) -> io::Result<Self> {
        // SAFETY: memfd_secret(2) takes one flag word and touches no memory of ours.
        let raw = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(raw as i32) };
        rustix::fs::ftruncate(&fd, len as u64)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing of ours.
        // The fd is closed on return, so this mapping is the only way to the pages.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                0,
            )
        }?;
        Self::adopt(start, len)
    }

    fn anonymous(len: usize) -> io::Result<Self> {
        // SAFETY: a fresh private mapping at an address of the kernel's choice; it aliases nothing.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let region = Self::adopt(start, len)?;
        // SAFETY: the range is exactly the live mapping made above.
        unsafe { rustix::mm::mlock_with(start, len, MlockFlags::empty()) }?;
        Ok(region)
    }

    fn adopt(start: *mut c_void, len: usize) -> io::Result<Self> {
        let region =
            Self { start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?, len };
        keep_to_this_process(start, len)?;
        Ok(region)
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start` is a live, initialised mapping of `len` bytes until drop; writers need `&mut`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for LockedRegion {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        // SAFETY: the mapping was made by this type, is unmapped once, and no reference outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

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
        // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing of ours.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }?;
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

fn keep_to_this_process(start: *mut c_void, len: usize) -> io::Result<()> {
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
    fn a_region_is_zeroed_page_sized_and_writable() {
        let mut region = LockedRegion::new(10).unwrap();
        assert_eq!(region.bytes().len() % rustix::param::page_size(), 0);
        assert!(region.bytes().iter().all(|&b| b == 0));
        region.bytes_mut()[..3].copy_from_slice(b"abc");
        assert_eq!(&region.bytes()[..3], b"abc");
    }

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
