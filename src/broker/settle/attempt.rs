//! The forbidden thing, tried once after each restriction.
#![forbid(unsafe_code)]

use std::io;

use super::SettleError;

/// An attempt at what a wall forbids, in a form that does no harm where it is permitted.
pub(super) struct Attempt {
    pub wall: &'static str,
    /// Completes "could still …".
    pub what: &'static str,
    /// How the wall answers. Another error would be someone else's, and prove nothing.
    pub refusals: &'static [i32],
}

impl Attempt {
    /// # Errors
    /// [`SettleError::StillPossible`] if the attempt succeeded, or failed of something else.
    pub fn must_fail<T>(self, outcome: Result<T, impl Into<io::Error>>) -> Result<(), SettleError> {
        let outcome = match outcome.map_err(Into::into) {
            Ok(_) => "it worked".to_owned(),
            Err(e) if e.raw_os_error().is_some_and(|n| self.refusals.contains(&n)) => return Ok(()),
            Err(e) => format!("it failed of something else: {e}"),
        };
        Err(SettleError::StillPossible { wall: self.wall, attempt: self.what, outcome })
    }
}
