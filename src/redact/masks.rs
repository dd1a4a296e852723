//! Values to be masked, and what finds them: made when there is a first byte of output, for most of it is locked
//! memory, which takes the kernel a while, and many commands say nothing.
#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::io;
use std::rc::Rc;

use super::{Patterns, Redactor};
use crate::model::secret::Secret;

pub struct Masks {
    values: Vec<Rc<Secret>>,
    patterns: OnceCell<Rc<Patterns>>,
}

impl Masks {
    pub fn new(values: Vec<Rc<Secret>>) -> Self {
        Self { values, patterns: OnceCell::new() }
    }

    /// How many values are too short to mask.
    pub fn unmasked(&self) -> usize {
        self.values.iter().filter(|value| !Patterns::take(value.expose())).count()
    }

    /// For one stream, of which nothing has been shown yet; none where there is nothing to mask.
    ///
    /// # Errors
    /// If memory cannot be locked (`RLIMIT_MEMLOCK`, getrlimit(2)): then nothing may be shown.
    pub fn redactor(&self) -> io::Result<Option<Redactor>> {
        let patterns = match self.patterns.get() {
            Some(patterns) => patterns,
            None => {
                let made = Patterns::new(self.values.iter().map(|value| value.expose()))?;
                self.patterns.get_or_init(|| Rc::new(made))
            }
        };
        (!patterns.is_empty()).then(|| Redactor::new(Rc::clone(patterns))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_looked_for_is_counted_beforehand() {
        let values: [&[u8]; 4] = [b"hunter2", b"hunter2\n", b"hunter22", b""];
        let secrets = values.iter().map(|value| Rc::new(Secret::copy_of(value).unwrap()));
        let masks = Masks::new(secrets.collect());
        assert_eq!(masks.unmasked(), 3);
        assert_eq!(masks.unmasked(), Patterns::new(values).unwrap().unmasked());
        assert!(masks.redactor().unwrap().is_some());
        assert!(Masks::new(Vec::new()).redactor().unwrap().is_none());
    }
}
