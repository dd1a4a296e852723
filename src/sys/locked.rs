//! Memory for values: locked, out of core dumps and forks, wiped before it is given back or used again.
//!
//! A page of memfd_secret(2) costs tens of microseconds when it is first touched and when it goes: the kernel
//! takes it out of its own map, and every CPU flushes its TLB. A value has some dozens of bytes. So blocks of at
//! most a page are cut from pages that the process keeps, and lie zeroed until the next one wants them. Larger
//! ones, of which each may have a size of its own, are mapped and unmapped.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{MapFlags, MlockFlags, ProtFlags};
use zeroize::Zeroize;

use super::memory::{keep_to_this_process, map_shared};

/// The least block, so that no two share a cache line.
const LEAST: usize = 64;
/// What is mapped at a time. Small: an ordinary user may lock 64 KiB in all on an older system (getrlimit(2),
/// `RLIMIT_MEMLOCK`).
const CHUNK: usize = 16 << 10;
/// What a process keeps when it has no block in use.
const KEPT: usize = 64 << 10;

/// A private block that never reaches swap, a core dump or a child.
pub struct LockedRegion {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the block is plain memory owned by this value alone; `&self` gives only `&[u8]`, so moving
// it between threads or sharing references to it follows the ordinary borrow rules.
unsafe impl Send for LockedRegion {}
// SAFETY: as above: no interior mutability.
unsafe impl Sync for LockedRegion {}

impl LockedRegion {
    /// At least `size` zeroed bytes.
    ///
    /// # Errors
    /// `EAGAIN` or `ENOMEM` if `RLIMIT_MEMLOCK` is exhausted (getrlimit(2)).
    pub fn new(size: usize) -> io::Result<Self> {
        let page = rustix::param::page_size();
        if size <= page {
            let len = size.next_power_of_two().clamp(LEAST, page);
            return Ok(Self { start: arena().take(len)?, len });
        }
        let len = size.checked_next_multiple_of(page).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start: Chunk::map(len)?.start, len })
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start` is a live, initialised block of `len` bytes until drop; writers need `&mut`.
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
        if self.len <= rustix::param::page_size() {
            arena().give_back(self.start, self.len);
        } else {
            Chunk { start: self.start, len: self.len }.unmap();
        }
    }
}

static ARENA: Mutex<Arena> = Mutex::new(Arena::empty(0));

/// This process's: what was inherited over a fork is not mapped here.
fn arena() -> MutexGuard<'static, Arena> {
    // Whoever panicked with it left lists of addresses, each of which is whole.
    let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if arena.process != process {
        *arena = Arena::empty(process);
    }
    arena
}

struct Arena {
    process: u32,
    chunks: Vec<Chunk>,
    /// Zeroed blocks that nobody has, by their size.
    free: BTreeMap<usize, Vec<Block>>,
    /// Of the latest chunk: what no block was cut from yet.
    rest: Option<Chunk>,
    in_use: usize,
}

#[derive(Clone, Copy)]
struct Block(NonNull<u8>);

#[derive(Clone, Copy)]
struct Chunk {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: addresses of mappings of this process, which belong to no thread.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Send for Chunk {}

impl Arena {
    const fn empty(process: u32) -> Self {
        Self { process, chunks: Vec::new(), free: BTreeMap::new(), rest: None, in_use: 0 }
    }

    fn take(&mut self, len: usize) -> io::Result<NonNull<u8>> {
        let block = match self.free.get_mut(&len).and_then(Vec::pop) {
            Some(Block(start)) => start,
            None => self.cut(len)?,
        };
        self.in_use += 1;
        Ok(block)
    }

    /// From the end of what is left of the latest chunk, or of a new one. What the one before has left is less
    /// than this block, and waits for the end of all.
    fn cut(&mut self, len: usize) -> io::Result<NonNull<u8>> {
        let from = match self.rest.filter(|rest| rest.len >= len) {
            Some(rest) => rest,
            None => {
                // Where there is no room for more, one page may still fit.
                let chunk =
                    Chunk::map(CHUNK).or_else(|_| Chunk::map(rustix::param::page_size()))?;
                self.chunks.push(chunk);
                chunk
            }
        };
        let left = Chunk { len: from.len - len, ..from };
        self.rest = Some(left);
        // SAFETY: what is cut off lies within the mapping, behind what is left.
        Ok(unsafe { from.start.add(left.len) })
    }

    fn give_back(&mut self, start: NonNull<u8>, len: usize) {
        self.free.entry(len).or_default().push(Block(start));
        self.in_use -= 1;
        if self.in_use == 0 && self.chunks.iter().map(|chunk| chunk.len).sum::<usize>() > KEPT {
            let process = self.process;
            for chunk in std::mem::replace(self, Self::empty(process)).chunks {
                chunk.unmap();
            }
        }
    }
}

impl Chunk {
    /// From memfd_secret(2) where the kernel has it (its pages leave the kernel's own direct map); else
    /// anonymous memory with mlock2(2). `MADV_DONTDUMP` and `MADV_DONTFORK` in both.
    fn map(len: usize) -> io::Result<Self> {
        Self::secret(len).or_else(|_| Self::anonymous(len))
    }

    fn secret(len: usize) -> io::Result<Self> {
        // SAFETY: memfd_secret(2) takes one flag word and touches no memory of ours.
        let raw = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(raw as i32) };
        rustix::fs::ftruncate(&fd, len as u64)?;
        // The descriptor is closed on return, so that this mapping is the only way to the pages.
        Self::adopt(map_shared(&fd, len)?, len)
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
        let chunk = Self::adopt(start, len)?;
        // SAFETY: the range is exactly the live mapping made above.
        match unsafe { rustix::mm::mlock_with(start, len, MlockFlags::empty()) } {
            Ok(()) => Ok(chunk),
            Err(e) => {
                chunk.unmap();
                Err(e.into())
            }
        }
    }

    fn adopt(start: *mut c_void, len: usize) -> io::Result<Self> {
        let chunk =
            Self { start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?, len };
        match keep_to_this_process(start, len) {
            Ok(()) => Ok(chunk),
            Err(e) => {
                chunk.unmap();
                Err(e)
            }
        }
    }

    /// Every block of it is zeroed and nobody's.
    fn unmap(self) {
        // SAFETY: the mapping was made by this type and is unmapped once; no block of it is in use.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_zeroed_and_writable_whatever_was_in_it() {
        for size in [0, 1, 64, 65, 2048, 2049, 4096, 4097, 20_480, 1 << 20] {
            for _ in 0..3 {
                let mut region = LockedRegion::new(size).unwrap();
                assert!(region.bytes().len() >= size.max(LEAST), "{size}");
                assert!(region.bytes().iter().all(|&b| b == 0), "{size}");
                region.bytes_mut().fill(0xa5);
            }
        }
    }

    #[test]
    fn blocks_that_live_together_do_not_overlap() {
        let mut arena = Arena::empty(std::process::id());
        let sizes = [64, 4096, 64, 2048, 64, 4096, 4096, 4096, 64, 128, 4096, 64];
        let mut blocks: Vec<(usize, usize)> =
            sizes.iter().map(|&len| (arena.take(len).unwrap().as_ptr().addr(), len)).collect();
        for &(start, len) in &blocks {
            let within = |chunk: &Chunk| {
                let from = chunk.start.as_ptr().addr();
                start >= from && start + len <= from + chunk.len
            };
            assert!(arena.chunks.iter().any(within));
            assert_eq!(start % LEAST, 0);
        }
        blocks.sort_unstable();
        assert!(blocks.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        for chunk in arena.chunks {
            chunk.unmap();
        }
    }

    #[test]
    fn what_is_given_back_serves_again_and_much_of_it_goes_back_to_the_kernel() {
        let mut arena = Arena::empty(std::process::id());
        let one = arena.take(4096).unwrap();
        arena.give_back(one, 4096);
        assert_eq!(arena.take(4096).unwrap(), one);
        let others: Vec<_> = (0..40).map(|_| arena.take(4096).unwrap()).collect();
        assert!(arena.chunks.len() >= 10);
        arena.give_back(one, 4096);
        assert!(!arena.chunks.is_empty());
        for block in others {
            arena.give_back(block, 4096);
        }
        assert!(arena.chunks.is_empty() && arena.free.is_empty() && arena.rest.is_none());
    }
}
