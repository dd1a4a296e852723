//! When which exec has something to do: so that a turn of the loop costs the same, however many live.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::watched::Key;

/// Moments of `CLOCK_BOOTTIME`, one a key.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    order: BTreeSet<(Duration, Key)>,
    of: BTreeMap<Key, Duration>,
}

impl Agenda {
    /// From now on the key's moment is this one, or none.
    pub fn set(&mut self, key: Key, at: Option<Duration>) {
        let before = match at {
            Some(at) => self.of.insert(key, at),
            None => self.of.remove(&key),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.order.remove(&(before, key));
        }
        if let Some(at) = at {
            self.order.insert((at, key));
        }
    }

    pub fn next(&self) -> Option<Duration> {
        self.order.first().map(|(at, _)| *at)
    }

    /// All whose moment has come, the earliest first. They keep it until it is set anew.
    pub fn due(&self, now: Duration) -> Vec<Key> {
        self.order.iter().take_while(|(at, _)| *at <= now).map(|(_, key)| *key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_comes_first_and_what_is_set_anew_counts() {
        let second = Duration::from_secs;
        let mut agenda = Agenda::default();
        assert_eq!((agenda.next(), agenda.due(second(9))), (None, vec![]));
        agenda.set(1, Some(second(5)));
        agenda.set(2, Some(second(3)));
        agenda.set(3, Some(second(3)));
        assert_eq!((agenda.next(), agenda.due(second(3))), (Some(second(3)), vec![2, 3]));
        agenda.set(2, Some(second(7)));
        agenda.set(3, None);
        agenda.set(3, None);
        assert_eq!((agenda.next(), agenda.due(second(9))), (Some(second(5)), vec![1, 2]));
        agenda.set(1, Some(second(5)));
        agenda.set(1, None);
        agenda.set(2, None);
        assert_eq!((agenda.next(), agenda.order.len(), agenda.of.len()), (None, 0, 0));
    }
}
