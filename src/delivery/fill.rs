//! Delivery containers, broker's side: writes the value once, straight into the pages that the command
//! will read, and keeps the mapping so that the broker too can wipe.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::memory::SharedMapping;

/// The broker's hold on one filled container. Wiped on drop.
pub struct Held {
    mapping: Option<Arc<Mutex<SharedMapping>>>,
    len: usize,
}

/// Wipes what a [`Held`] holds, from wherever the revocation comes. Wiped on drop of the last of both.
pub struct Wiper(Arc<Mutex<SharedMapping>>);

/// A look at the content as it stands in the container. No one wipes meanwhile.
pub struct Content<'a>(Option<MutexGuard<'a, SharedMapping>>);

impl Held {
    /// Zeroes what every holder sees.
    pub fn wipe(&self) {
        if let Some(mapping) = &self.mapping {
            lock(mapping).wipe();
        }
    }

    /// None where there is nothing to wipe.
    pub fn wiper(&self) -> Option<Wiper> {
        self.mapping.as_ref().map(|mapping| Wiper(Arc::clone(mapping)))
    }

    pub fn expose(&self) -> Content<'_> {
        Content(self.mapping.as_deref().map(lock))
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Wiper {
    /// Zeroes what every holder sees, before it returns.
    pub fn wipe(&self) {
        lock(&self.0).wipe();
    }
}

impl std::fmt::Debug for Wiper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wiper")
    }
}

impl Content<'_> {
    pub fn bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], |mapping| mapping.bytes())
    }
}

fn lock(mapping: &Mutex<SharedMapping>) -> MutexGuard<'_, SharedMapping> {
    // Plain bytes: whatever state they are in, they can be wiped.
    mapping.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sizes the container for `size` bytes and lets `write` put them there. The descriptor is closed
/// afterwards; only the mapping stays.
pub fn with<E: From<io::Error>>(
    container: OwnedFd,
    size: usize,
    write: impl FnOnce(&mut [u8]) -> Result<(), E>,
) -> Result<Held, E> {
    rustix::fs::ftruncate(&container, size as u64).map_err(io::Error::from)?;
    if size == 0 {
        write(&mut [])?;
        return Ok(Held { mapping: None, len: 0 });
    }
    let mut mapping = SharedMapping::new(&container, size)?;
    write(mapping.bytes_mut())?;
    Ok(Held { mapping: Some(Arc::new(Mutex::new(mapping))), len: size })
}

/// Fills the container with these parts, one after the other.
pub fn write(container: OwnedFd, parts: &[&[u8]]) -> io::Result<Held> {
    let size = parts.iter().map(|p| p.len()).sum();
    with(container, size, |bytes| {
        let mut rest = bytes;
        for part in parts {
            let (now, later) = rest.split_at_mut(part.len());
            now.copy_from_slice(part);
            rest = later;
        }
        Ok(())
    })
}
