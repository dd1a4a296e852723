//! Decisions and texts out of fuzzed bytes. What is used up reads as zero, so that every input is whole.
#![forbid(unsafe_code)]

pub struct Feed<'a>(&'a [u8]);

impl<'a> Feed<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Below `end`, which is at most 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// At most 255 bytes: one that says how many, then so many as are left of them.
    pub fn chunk(&mut self) -> &'a [u8] {
        let size = usize::from(self.byte()).min(self.0.len());
        let (chunk, rest) = self.0.split_at(size);
        self.0 = rest;
        chunk
    }

    pub fn text(&mut self) -> String {
        String::from_utf8_lossy(self.chunk()).into_owned()
    }

    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

/// The parts of a text that lines of `%%` separate: several files in one input that a person can read.
pub fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let cut = text.starts_with("%%\n").then_some((0, 3));
        match cut.or_else(|| text.find("\n%%\n").map(|at| (at + 1, at + 4))) {
            Some((end, next)) => {
                rest = Some(&text[next..]);
                Some(&text[..end])
            }
            None => {
                rest = None;
                Some(text)
            }
        }
    })
}
