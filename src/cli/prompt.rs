//! A value typed at a terminal: not echoed, read byte by byte straight into locked memory.
//!
//! The terminal's line editor is off: it would keep a copy of the line, end it at 4095 bytes (termios(3)),
//! and let Ctrl-C end us with the echo off. Therefore erasing and interrupting are done here.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write as _};
use std::os::fd::AsFd;

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::model::secret::Secret;

/// What can be typed. A longer value has not been typed but pasted, and goes in by standard input.
const TYPED_MAX: usize = 16 << 10;

/// Why no value came.
#[derive(Debug, thiserror::Error)]
pub enum NoValue {
    #[error("interrupted")]
    Interrupted,
    #[error("the two entries differ; a value of several lines goes in by standard input")]
    Mismatch,
    #[error("a typed value is at most {TYPED_MAX} bytes; a longer one goes in by standard input")]
    TooLong,
    #[error("cannot read the terminal: {0}")]
    Terminal(#[from] io::Error),
}

/// Asks twice on standard error and reads from standard input, which is a terminal.
///
/// # Errors
/// See [`NoValue`]. The terminal is as it was afterwards.
pub fn twice(what: &str) -> Result<Secret, NoValue> {
    let stdin = io::stdin();
    let _quiet = Quiet::new(&stdin)?;
    let first = ask(&format!("{what}: "))?;
    let second = ask("the same again: ")?;
    if first.expose() == second.expose() { Ok(first) } else { Err(NoValue::Mismatch) }
}

fn ask(prompt: &str) -> Result<Secret, NoValue> {
    let mut stderr = io::stderr().lock();
    stderr.write_all(prompt.as_bytes())?;
    let line = line(RawStdin);
    stderr.write_all(b"\n")?;
    line
}

/// Standard input past std's buffer, which is never wiped.
pub struct RawStdin;

impl Read for RawStdin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(rustix::stdio::stdin(), buffer)?)
    }
}

/// One line with the keys that every terminal has: backspace, Ctrl-U, Ctrl-C, Ctrl-D.
fn line(mut keys: impl Read) -> Result<Secret, NoValue> {
    let mut value = Secret::zeroed(TYPED_MAX)?;
    let mut len = 0;
    loop {
        let mut key = [0];
        match keys.read(&mut key) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e.into()),
        }
        match key[0] {
            b'\r' | b'\n' | 0x04 => break,
            0x03 => return Err(NoValue::Interrupted),
            0x15 => len = 0,
            0x08 | 0x7f => {
                // A whole character: the continuation bytes of UTF-8 go with their first one.
                while len > 0 {
                    len -= 1;
                    if value.expose()[len] & 0xc0 != 0x80 {
                        break;
                    }
                }
            }
            _ if len == TYPED_MAX => return Err(NoValue::TooLong),
            byte => {
                value.expose_mut()[len] = byte;
                len += 1;
            }
        }
    }
    value.truncate(len);
    Ok(value)
}

/// The terminal without echo, line editing and signals, until dropped.
struct Quiet<'a> {
    terminal: &'a io::Stdin,
    before: Termios,
}

impl<'a> Quiet<'a> {
    fn new(terminal: &'a io::Stdin) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut quiet = before.clone();
        quiet.local_modes -= LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
        // What was typed ahead was echoed: it is thrown away.
        tcsetattr(terminal.as_fd(), OptionalActions::Flush, &quiet)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        if let Err(e) = tcsetattr(self.terminal.as_fd(), OptionalActions::Flush, &self.before) {
            eprintln!("sublet: could not give the terminal its echo back: {e} (try `reset`)");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_make_a_line() {
        #[track_caller]
        fn check(keys: &[u8], value: &[u8]) {
            assert_eq!(line(keys).unwrap().expose(), value, "{keys:?}");
        }
        check(b"secret\nmore", b"secret");
        check(b"secret\r", b"secret");
        check(b"wrong\x15right\n", b"right");
        check(b"ab\x7fc\n", b"ac");
        check("aß\x08c\n".as_bytes(), b"ac");
        check(b"\x7f\x7fx\n", b"x");
        check(b"no end", b"no end");
        check(b"ended\x04", b"ended");
        check(b"", b"");
        check(&[b'x'; 10_000], &[b'x'; 10_000]);
    }

    #[test]
    fn ctrl_c_and_too_much_are_no_value() {
        assert!(matches!(line(&b"half\x03"[..]), Err(NoValue::Interrupted)));
        assert!(matches!(line(&vec![b'x'; TYPED_MAX + 1][..]), Err(NoValue::TooLong)));
    }
}
