//! An allocator that can overwrite what it takes back. The minter turns it on: what an HTTP client and a JSON
//! parser leave on the heap is not ours to wipe piece by piece. Elsewhere it is the system's own.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering};

use zeroize::Zeroize;

static ON: AtomicBool = AtomicBool::new(false);

/// From now on this process overwrites whatever it frees. For good.
pub fn wipe_what_is_freed() {
    ON.store(true, Ordering::Relaxed);
}

pub struct Wiping;

// SAFETY: every request is passed on to `System` with the layout that it came with. `realloc` is the trait's
// own way by alloc, copy and dealloc where wiping is on, so that no block moves without its old place being
// overwritten.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if ON.load(Ordering::Relaxed) {
            // SAFETY: the block is live and has `layout.size()` bytes until the call below, and nobody else
            // looks at it any more. Bytes that were never written are written here first, not read.
            unsafe {
                block.write_bytes(0, layout.size());
                std::slice::from_raw_parts_mut(block, layout.size()).zeroize();
            }
        }
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !ON.load(Ordering::Relaxed) {
            // SAFETY: the caller's promises are passed on.
            return unsafe { System.realloc(block, layout, size) };
        }
        // SAFETY: the caller promises that `size` is not zero and does not overflow with this alignment; both
        // blocks are live, distinct, and as long as is copied; the old one is given back once.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                new.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            new
        }
    }
}
