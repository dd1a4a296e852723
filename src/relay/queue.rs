//! Bytes that wait to be written. Where they may hold a value, none outlives its turn: what was taken is wiped, and
//! so is the place that a growing queue leaves.
#![forbid(unsafe_code)]

use zeroize::Zeroize;

#[derive(Default)]
pub struct Queue {
    bytes: Vec<u8>,
    /// So many of them were written.
    taken: usize,
    holds_values: bool,
}

impl Queue {
    /// What comes from now on may hold values.
    pub fn expect_values(&mut self) {
        self.holds_values = true;
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What still waits.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.room_for(bytes.len()).extend_from_slice(bytes);
    }

    /// To append at most so many bytes to: with more, it would move, and leave what it holds behind.
    pub fn room_for(&mut self, bytes: usize) -> &mut Vec<u8> {
        if self.bytes.capacity() - self.bytes.len() < bytes {
            let rest = self.rest();
            let mut larger = Vec::with_capacity((rest.len() + bytes).max(2 * rest.len()));
            larger.extend_from_slice(rest);
            self.clear();
            self.bytes = larger;
        }
        &mut self.bytes
    }

    /// So many of what waits are written.
    pub fn take(&mut self, bytes: usize) {
        let before = self.taken;
        self.taken = before + bytes.min(self.rest().len());
        if self.holds_values {
            self.bytes[before..self.taken].zeroize();
        }
        if self.taken == self.bytes.len() {
            self.bytes.clear();
            self.taken = 0;
        }
    }

    /// Nobody takes what waits.
    pub fn clear(&mut self) {
        self.take(self.bytes.len());
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const MARK: [u8; 8] = *b"\x91queued\x92";

    fn marked() -> Queue {
        let mut queue = Queue::default();
        queue.push(&MARK.repeat(64));
        queue
    }

    /// Whether a mark is left where the queue's bytes are, once `then` has happened to it.
    fn leaves(mut queue: Queue, then: fn(Queue)) -> bool {
        let (at, len) = (queue.bytes.as_ptr() as u64, queue.bytes.len());
        let memory = File::open("/proc/self/mem").unwrap();
        let mut left = [0; 1024];
        let left = &mut left[..len];
        queue.take(8);
        then(queue);
        // Freed memory may be no one's any more; nothing is allocated before it is looked at.
        memory.read_at(left, at).is_ok() && left.windows(8).any(|eight| eight == MARK)
    }

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let (mut queue, mut got, mut next) = (Queue::default(), Vec::new(), 0u8);
        for turn in 0..200 {
            let pushed: Vec<u8> = (0..turn % 7 * 5).map(|nth| next.wrapping_add(nth)).collect();
            next = next.wrapping_add(pushed.len() as u8);
            queue.push(&pushed);
            let taken = queue.rest().len().min(turn as usize % 11);
            got.extend_from_slice(&queue.rest()[..taken]);
            queue.take(taken);
        }
        got.extend_from_slice(queue.rest());
        queue.take(queue.rest().len());
        assert!(queue.is_empty() && queue.rest().is_empty());
        assert!(got.iter().enumerate().all(|(nth, &byte)| nth as u8 == byte));
        assert_eq!(got.last(), Some(&next.wrapping_sub(1)));
    }

    #[test]
    fn a_queue_that_is_always_behind_keeps_no_more_than_what_waits() {
        let mut queue = Queue::default();
        queue.push(&[0; 100]);
        for _ in 0..10_000 {
            queue.push(&[0; 100]);
            queue.take(100);
        }
        assert!(queue.bytes.capacity() < 1_000, "{}", queue.bytes.capacity());
    }

    #[test]
    fn nothing_is_left_where_values_were() {
        let ways: [fn(Queue); 4] = [
            drop,
            |mut queue| queue.clear(),
            |mut queue| queue.take(queue.rest().len()),
            // Moves.
            |mut queue| {
                queue.room_for(1 << 20);
            },
        ];
        for way in ways {
            let mut queue = marked();
            queue.expect_values();
            assert!(!leaves(queue, way));
            // The control: without that, the look would find it.
            assert!(leaves(marked(), way));
        }
    }
}
