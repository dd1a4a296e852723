//! How much room a read is given: little where little is said, since a page that is never touched still has to be
//! asked of the allocator, and given back.
#![forbid(unsafe_code)]

const LEAST: usize = 4 << 10;
/// As much as a pipe holds, unless someone changed that. pipe(7).
pub const MOST: usize = 64 << 10;

#[derive(Debug)]
pub struct Room(usize);

impl Default for Room {
    fn default() -> Self {
        Self(LEAST)
    }
}

impl Room {
    /// For the next read.
    pub fn bytes(&self) -> usize {
        self.0
    }

    /// So much was read: who fills its room has more to say.
    pub fn heard(&mut self, bytes: usize) {
        if bytes >= self.0 {
            self.0 = (self.0 * 4).min(MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_for_who_fills_it_and_no_further_than_a_pipe() {
        let mut room = Room::default();
        room.heard(LEAST - 1);
        assert_eq!(room.bytes(), LEAST);
        for _ in 0..9 {
            room.heard(room.bytes());
        }
        assert_eq!(room.bytes(), MOST);
    }
}
