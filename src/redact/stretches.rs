//! Receives the stretches of the stream that hold values, in any order and overlapping; keeps them
//! disjoint and sorted until they are shown as masks.
#![forbid(unsafe_code)]

use super::window::Place;

#[derive(Default)]
pub(super) struct Stretches {
    sorted: Vec<(Place, Place)>,
    #[cfg(test)]
    pub steps: u64,
}

impl Stretches {
    /// Joins `from..to` with all that share a byte with it.
    pub fn add(&mut self, from: Place, to: Place) {
        // Found nearly in order, so nearly always at the end.
        let after = self.sorted.iter().rev().take_while(|(start, _)| *start >= to).count();
        let end = self.sorted.len() - after;
        let joined = self.sorted[..end].iter().rev().take_while(|(_, end)| *end > from).count();
        let begin = end - joined;
        if joined == 0 {
            self.sorted.insert(begin, (from, to));
        } else {
            let joined = (self.sorted[begin].0.min(from), self.sorted[end - 1].1.max(to));
            self.sorted[begin] = joined;
            self.sorted.drain(begin + 1..end);
        }
    }

    /// Takes out those that begin at or before `place`.
    pub fn take_until(&mut self, place: Place) -> impl Iterator<Item = (Place, Place)> {
        let count = self.sorted.partition_point(|(from, _)| *from <= place);
        self.sorted.drain(..count)
    }

    #[inline]
    pub fn count_step(&mut self) {
        #[cfg(test)]
        {
            self.steps += 1;
        }
    }
}
