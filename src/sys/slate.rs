//! A page of memory that a launcher writes and its child reads, mapped before the clone at one address
//! in both: what becomes known after the clone (paths, argv, envp) goes to a child that must not
//! allocate, in the very form in which execve(2) takes it. mmap(2) `MAP_SHARED | MAP_ANONYMOUS`.
//!
//! The launcher writes a list before it tells the child of it, and never again; a packet between them is
//! what orders the two. It never reads back. The child's side bounds every look, allocates nothing, and
//! unmaps the slate before the command's exec has an init that lives on.

use std::ffi::{CStr, c_char};
use std::io;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::process::last_errno;

/// How many lists there can be.
pub const LISTS: usize = 8;
/// More than execve takes by any limit on the stack that is usual: a quarter of it, at most 6 MiB. Only
/// touched pages cost.
const SIZE: usize = 8 << 20;

/// One list of a slate.
pub type Place = usize;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Entry {
    /// Of the first pointer or number, from the slate's start.
    offset: u32,
    count: u32,
    /// Null pointers behind the last one, of which one stays.
    room: u32,
}

/// What does not fit: more than execve would take.
#[derive(Debug, thiserror::Error)]
#[error("the command's arguments and environment have more than {} bytes", SIZE)]
pub struct Full;

pub struct Slate {
    start: NonNull<u8>,
    used: usize,
}

impl Slate {
    pub fn new() -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice; it aliases nothing of ours.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, used: LISTS * size_of::<Entry>() })
    }

    /// Launcher's side, once its child is cloned: no other child gets this mapping. madvise(2)
    /// `MADV_DONTFORK`.
    pub fn keep_from_others(&self) -> io::Result<()> {
        // SAFETY: the advice changes only what fork does with this live range of ours.
        unsafe {
            rustix::mm::madvise(self.start.as_ptr().cast(), SIZE, rustix::mm::Advice::LinuxDontFork)
        }?;
        Ok(())
    }

    /// Launcher's side: lays out a null-terminated vector of these strings, with `reserve` free slots.
    pub fn put_strings<S: AsRef<CStr>>(
        &mut self,
        place: Place,
        strings: &[S],
        reserve: usize,
    ) -> Result<(), Full> {
        let slots = strings.len() + reserve + 1;
        let offset = self.take(slots * size_of::<usize>())?;
        for (index, string) in strings.iter().enumerate() {
            let bytes = string.as_ref().to_bytes_with_nul();
            let at = self.take(bytes.len())?;
            // SAFETY: `take` gave this range of the live mapping to nobody else; it is as long as `bytes`,
            // and `offset` is aligned for a pointer, with room for `slots` of them.
            unsafe {
                let target = self.start.as_ptr().add(at);
                ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
                self.start.as_ptr().add(offset).cast::<usize>().add(index).write(target as usize);
            }
        }
        // The reserve and the terminator: anonymous memory begins as zeros.
        self.enter(place, offset, strings.len(), reserve)
    }

    /// Launcher's side: lays out numbers.
    pub fn put_numbers(&mut self, place: Place, numbers: &[i64]) -> Result<(), Full> {
        let offset = self.take(size_of_val(numbers))?;
        for (index, &number) in numbers.iter().enumerate() {
            // SAFETY: as in `put_strings`; the offset is aligned for an i64.
            unsafe { self.start.as_ptr().add(offset).cast::<i64>().add(index).write(number) };
        }
        self.enter(place, offset, numbers.len(), 0)
    }

    /// Room for `bytes`, aligned for a pointer.
    fn take(&mut self, bytes: usize) -> Result<usize, Full> {
        let offset = self.used.next_multiple_of(size_of::<usize>());
        self.used = offset.checked_add(bytes).filter(|end| *end <= SIZE).ok_or(Full)?;
        Ok(offset)
    }

    fn enter(
        &mut self,
        place: Place,
        offset: usize,
        count: usize,
        room: usize,
    ) -> Result<(), Full> {
        let entry = Entry { offset: offset as u32, count: count as u32, room: room as u32 };
        if place >= LISTS {
            return Err(Full);
        }
        // SAFETY: the table of LISTS entries stands at the mapping's start, which is page-aligned.
        unsafe { self.start.cast::<Entry>().add(place).write(entry) };
        Ok(())
    }

    fn entry(&self, place: Place) -> Entry {
        if place >= LISTS {
            return Entry::default();
        }
        // SAFETY: as in `enter`; an Entry is plain numbers, and any bits are one.
        unsafe { self.start.cast::<Entry>().add(place).read() }
    }

    /// The bytes of `count` items of `size` from `offset`, if they lie in the slate.
    fn lies_within(offset: usize, count: usize, size: usize) -> bool {
        offset.is_multiple_of(size)
            && count
                .checked_mul(size)
                .and_then(|bytes| offset.checked_add(bytes))
                .is_some_and(|end| end <= SIZE)
    }

    /// How many items a list has. Child-side.
    pub fn count(&self, place: Place) -> usize {
        self.entry(place).count as usize
    }

    /// One string of a list. Child-side.
    pub fn string(&self, place: Place, index: usize) -> Result<&CStr, Errno> {
        let entry = self.entry(place);
        let (offset, count) = (entry.offset as usize, entry.count as usize);
        if index >= count || !Self::lies_within(offset, count, size_of::<usize>()) {
            return Err(Errno::BADMSG);
        }
        let start = self.start.as_ptr() as usize;
        // SAFETY: the list lies within the mapping and is aligned, both just seen.
        let at = unsafe { self.start.as_ptr().add(offset).cast::<usize>().add(index).read() };
        let at = at.checked_sub(start).filter(|at| *at < SIZE).ok_or(Errno::BADMSG)?;
        // SAFETY: from `at` to the end of the live mapping; the launcher no longer writes what it has told.
        let bytes = unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), SIZE - at) };
        CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::BADMSG)
    }

    /// One number of a list. Child-side.
    pub fn number(&self, place: Place, index: usize) -> Result<i64, Errno> {
        let entry = self.entry(place);
        let (offset, count) = (entry.offset as usize, entry.count as usize);
        if index >= count || !Self::lies_within(offset, count, size_of::<i64>()) {
            return Err(Errno::BADMSG);
        }
        // SAFETY: the list lies within the mapping and is aligned, both just seen.
        Ok(unsafe { self.start.as_ptr().add(offset).cast::<i64>().add(index).read() })
    }

    /// Adds a string that lives elsewhere, in a reserved slot of a list. Child-side.
    ///
    /// The bytes must stay mapped and unchanged in length until exec; the caller holds the mapping.
    ///
    /// # Errors
    /// `NOSPC` if no slot is left.
    pub fn place(&self, place: Place, string: &CStr) -> Result<(), Errno> {
        let Entry { offset, count, room } = self.entry(place);
        let slots = (count as usize).saturating_add(room as usize).saturating_add(1);
        if room == 0 || !Self::lies_within(offset as usize, slots, size_of::<usize>()) {
            return Err(Errno::NOSPC);
        }
        // SAFETY: slot `count` lies within the mapping, just seen, and the null behind it stays.
        unsafe {
            let slot = self.start.as_ptr().add(offset as usize).cast::<usize>().add(count as usize);
            slot.write(string.as_ptr() as usize);
        }
        let entry = Entry { offset, count: count + 1, room: room - 1 };
        // SAFETY: as in `enter`; `place` was in bounds, or its room would have been 0.
        unsafe { self.start.cast::<Entry>().add(place).write(entry) };
        Ok(())
    }

    fn vector(&self, place: Place) -> Result<*const *const c_char, Errno> {
        let Entry { offset, count, room } = self.entry(place);
        let slots = (count as usize).saturating_add(room as usize).saturating_add(1);
        if offset == 0 || !Self::lies_within(offset as usize, slots, size_of::<usize>()) {
            return Err(Errno::BADMSG);
        }
        // SAFETY: the offset lies within the mapping.
        Ok(unsafe { self.start.as_ptr().add(offset as usize) }.cast())
    }

    /// Replaces this process's image. Returns only on failure. Child-side.
    pub fn execve(&self, program: &CStr, argv: Place, envp: Place) -> Errno {
        let (argv, envp) = match (self.vector(argv), self.vector(envp)) {
            (Ok(argv), Ok(envp)) => (argv, envp),
            (Err(e), _) | (_, Err(e)) => return e,
        };
        // SAFETY: both vectors lie in the live mapping and end in a null pointer that nobody overwrites
        // (`put_strings`, `place`); the strings are in the mapping or kept by the caller of `place`. The
        // kernel checks every address that it copies from.
        unsafe { libc::execve(program.as_ptr(), argv, envp) };
        last_errno()
    }
}

impl Drop for Slate {
    fn drop(&mut self) {
        // SAFETY: made by this type, unmapped once; every reference borrows from `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), SIZE) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_come_back_as_they_were_put() {
        let mut slate = Slate::new().unwrap();
        slate.put_strings(0, &[c"one", c""], 1).unwrap();
        slate.put_numbers(1, &[3, -1]).unwrap();
        assert_eq!(slate.count(0), 2);
        assert_eq!(slate.string(0, 0), Ok(c"one"));
        assert_eq!(slate.string(0, 1), Ok(c""));
        assert_eq!(slate.string(0, 2), Err(Errno::BADMSG));
        assert_eq!((slate.number(1, 0), slate.number(1, 1)), (Ok(3), Ok(-1)));
        assert_eq!(slate.number(2, 0), Err(Errno::BADMSG));
        assert_eq!(slate.place(0, c"placed"), Ok(()));
        assert_eq!(slate.place(0, c"one too many"), Err(Errno::NOSPC));
        assert_eq!(slate.count(0), 3);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut slate = Slate::new().unwrap();
        let long = std::ffi::CString::new(vec![b'x'; SIZE / 2]).unwrap();
        assert!(slate.put_strings(0, &[&long], 0).is_ok());
        assert!(slate.put_strings(1, &[&long], 0).is_err());
        assert!(slate.put_numbers(LISTS, &[1]).is_err());
    }

    #[test]
    fn a_program_is_executed_with_what_the_slate_holds() {
        let mut slate = Slate::new().unwrap();
        slate.put_strings(0, &[c"sh", c"-c", c"exit $CODE"], 0).unwrap();
        slate.put_strings(1, &[c"CODE=7"], 0).unwrap();
        // SAFETY: a fork of the test's process that only executes or exits.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            slate.execve(c"/bin/sh", 0, 1);
            super::super::process::exit_now(1);
        }
        let status = super::super::process::wait_for(pid).unwrap();
        assert_eq!(status.code(), Some(7));
    }
}
