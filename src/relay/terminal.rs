//! Our own terminal while the command has one of its own: raw, so that every key goes through, and given
//! back as it was.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

/// Our terminal in raw mode; given back on drop.
pub struct RawMode<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> RawMode<'a> {
    /// `None` where `terminal` is none.
    pub fn enter(terminal: BorrowedFd<'a>) -> Result<Option<Self>, Errno> {
        let before = match tcgetattr(terminal) {
            Ok(before) => before,
            Err(Errno::NOTTY) => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawMode<'_> {
    fn drop(&mut self) {
        if let Err(e) = tcsetattr(self.terminal, OptionalActions::Now, &self.before) {
            eprintln!("sublet: could not give the terminal its mode back: {e} (try `reset`)\r");
        }
    }
}

/// Rows and columns of the first of these that is a terminal, else 24 and 80.
pub fn size(candidates: &[BorrowedFd<'_>]) -> (u16, u16) {
    candidates
        .iter()
        .find_map(|fd| tcgetwinsize(fd).ok())
        .filter(|s| s.ws_row > 0 && s.ws_col > 0)
        .map_or((24, 80), |s| (s.ws_row, s.ws_col))
}

/// Gives the command's terminal the size of ours; the kernel tells the command (SIGWINCH).
pub fn follow_size(ours: &[BorrowedFd<'_>], master: impl AsFd) -> Result<(), Errno> {
    let Some(size) = ours.iter().find_map(|fd| tcgetwinsize(fd).ok()) else { return Ok(()) };
    tcsetwinsize(master, size)
}

/// Gives the command's terminal this size; the kernel tells the command (SIGWINCH).
pub fn set_size(master: impl AsFd, rows: u16, columns: u16) -> Result<(), Errno> {
    let size =
        rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(master, size)
}
