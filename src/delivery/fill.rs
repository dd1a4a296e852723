//! Delivery containers, broker's side: writes the value once, straight into the pages that the command
//! will read, and keeps the mapping so that the broker too can wipe.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use crate::sys::memory::SharedMapping;

/// The broker's hold on one filled container. Wiped on drop.
pub struct Held {
    mapping: Option<SharedMapping>,
}

impl Held {
    /// Zeroes what every holder sees.
    pub fn wipe(&mut self) {
        if let Some(mapping) = &mut self.mapping {
            mapping.wipe();
        }
    }

    /// The content as it stands in the container.
    pub fn expose(&self) -> &[u8] {
        self.mapping.as_ref().map_or(&[], SharedMapping::bytes)
    }

    pub fn len(&self) -> usize {
        self.mapping.as_ref().map_or(0, SharedMapping::len)
    }

    pub fn is_empty(&self) -> bool {
        self.mapping.is_none()
    }
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
        return Ok(Held { mapping: None });
    }
    let mut mapping = SharedMapping::new(&container, size)?;
    write(mapping.bytes_mut())?;
    Ok(Held { mapping: Some(mapping) })
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
