//! Receives the tail of a stream that is still needed, keeps it in locked memory, and lets the readers
//! see it and the chunk at hand as one text. Never keeps a byte elsewhere, never grows in memory that
//! cannot be locked.
#![forbid(unsafe_code)]

use std::io;

use zeroize::Zeroize;

use crate::model::secret::Secret;

/// A place in the stream: bytes since its beginning.
pub(super) type Place = u64;

/// The kept tail of the stream.
pub(super) struct Window {
    memory: Secret,
    from: usize,
    to: usize,
    /// Where in the stream the byte at `from` was.
    base: Place,
    /// As if no more memory than this could be locked.
    #[cfg(test)]
    pub most: Option<usize>,
}

/// The kept tail and the chunk behind it.
#[derive(Clone, Copy)]
pub(super) struct Text<'a> {
    kept: &'a [u8],
    chunk: &'a [u8],
    base: Place,
    chunk_base: Place,
    is_over: bool,
}

impl Window {
    pub fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self {
            memory: Secret::zeroed(capacity.max(4096))?,
            from: 0,
            to: 0,
            base: 0,
            #[cfg(test)]
            most: None,
        })
    }

    pub fn end(&self) -> Place {
        self.base + (self.to - self.from) as Place
    }

    pub fn text<'a>(&'a self, chunk: &'a [u8]) -> Text<'a> {
        let kept = &self.memory.expose()[self.from..self.to];
        Text { kept, chunk, base: self.base, chunk_base: self.end(), is_over: false }
    }

    /// Sees to it that [`Window::slide`] has room.
    ///
    /// # Errors
    /// If more memory was needed and could not be locked; then nothing has changed.
    pub fn reserve(&mut self, place: Place, chunk: &[u8]) -> io::Result<()> {
        let (start, added) = self.split(place, chunk);
        let kept = self.to - start;
        let (need, room) = (kept + added.len(), self.memory.len());
        // A move must free at least a quarter of what it moves; else each byte pushed could move the
        // whole tail again.
        if self.to + added.len() <= room || need <= room && start >= kept / 4 {
            return Ok(());
        }
        match self.lock(need + need / 2) {
            Ok(mut larger) => {
                larger.expose_mut()[..kept].copy_from_slice(&self.memory.expose()[start..self.to]);
                self.base += (start - self.from) as Place;
                (self.memory, self.from, self.to) = (larger, 0, kept);
                Ok(())
            }
            Err(_) if need <= room => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn lock(&self, len: usize) -> io::Result<Secret> {
        #[cfg(test)]
        if self.most.is_some_and(|most| len > most) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Secret::zeroed(len)
    }

    /// Keeps of itself and the `chunk` behind it only what lies at or after `place`, and wipes the rest.
    pub fn slide(&mut self, place: Place, chunk: &[u8]) {
        let (start, added) = self.split(place, chunk);
        let kept = self.to - start;
        let memory = self.memory.expose_mut();
        if kept == 0 || self.to + added.len() > memory.len() {
            memory.copy_within(start..self.to, 0);
            memory[kept..self.to].zeroize();
            (self.from, self.to) = (0, kept);
        } else {
            memory[self.from..start].zeroize();
            self.from = start;
        }
        memory[self.to..self.to + added.len()].copy_from_slice(added);
        self.to += added.len();
        self.base = place;
    }

    /// Where in the memory `place` is (or the end), and what of `chunk` lies at or after it.
    fn split<'a>(&self, place: Place, chunk: &'a [u8]) -> (usize, &'a [u8]) {
        let end = self.end();
        let start = self.from + (place.min(end) - self.base) as usize;
        (start, &chunk[(place.max(end) - end) as usize..])
    }
}

impl Text<'_> {
    /// The same, and nothing follows it.
    pub fn over(self) -> Self {
        Self { is_over: true, ..self }
    }

    pub fn end(&self) -> Place {
        self.chunk_base + self.chunk.len() as Place
    }

    /// `None` past the end: the byte is not here yet.
    #[inline]
    pub fn get(&self, place: Place) -> Option<u8> {
        if place >= self.chunk_base {
            self.chunk.get((place - self.chunk_base) as usize).copied()
        } else {
            self.kept.get((place - self.base) as usize).copied()
        }
    }

    /// As [`Text::get`], for a byte that may decide what stands before it. Behind the end of a text that is
    /// over stands a NUL, which goes on with no escape.
    #[inline]
    pub fn ahead(&self, place: Place) -> Option<u8> {
        self.get(place).or(self.is_over.then_some(0))
    }

    pub fn copy(&self, from: Place, to: Place, out: &mut Vec<u8>) {
        let split = self.chunk_base.clamp(from, to);
        if from < split {
            let (a, b) = (from - self.base, split - self.base);
            out.extend_from_slice(&self.kept[a as usize..b as usize]);
        }
        if split < to {
            let (a, b) = (split - self.chunk_base, to - self.chunk_base);
            out.extend_from_slice(&self.chunk[a as usize..b as usize]);
        }
    }
}
