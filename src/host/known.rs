//! The profiles that were resolved lately, each with every text that it was resolved from, so that it can be
//! known again.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ProfileRef;
use crate::profile::{LoadError, Profile};

/// How many are kept.
const MOST: usize = 16;

#[derive(Debug)]
struct Known {
    which: ProfileRef,
    text: String,
    /// By the names that they are extended by.
    extended: Vec<(String, String)>,
    profile: Profile,
}

/// The latest first.
#[derive(Debug, Default)]
pub(super) struct KnownProfiles(Mutex<VecDeque<Arc<Known>>>);

impl KnownProfiles {
    /// The profile, if its text and all that it extends, which `load` reads, are what they were.
    pub fn profile(
        &self,
        which: &ProfileRef,
        text: &str,
        load: impl Fn(&str) -> Result<String, LoadError>,
    ) -> Option<Profile> {
        let known = {
            let mut all = self.lock();
            let at = all.iter().position(|known| known.which == *which)?;
            let known = all.remove(at)?;
            all.push_front(Arc::clone(&known));
            known
        };
        let is_unchanged = |(name, text): &(String, String)| load(name).is_ok_and(|t| t == *text);
        let is_same = known.text == text && known.extended.iter().all(is_unchanged);
        is_same.then(|| known.profile.clone())
    }

    pub fn keep(
        &self,
        which: &ProfileRef,
        text: String,
        extended: Vec<(String, String)>,
        profile: &Profile,
    ) {
        let (which, profile) = (which.clone(), profile.clone());
        let mut all = self.lock();
        all.retain(|known| known.which != which);
        all.push_front(Arc::new(Known { which, text, extended, profile }));
        all.truncate(MOST);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<Known>>> {
        // Whoever panicked with it left whole entries.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
