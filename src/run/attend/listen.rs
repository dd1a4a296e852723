//! What whoever asked for the exec says while it lives: input, signals, the size of a terminal, and what the
//! broker's mail says for them.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use rustix::stdio::{stderr, stdin, stdout};

use super::{Attendant, output};
use crate::launcher::wire::Order;
use crate::relay::connection::{ConnectionError, Said};
use crate::relay::frames::Kind;
use crate::relay::input::Input;
use crate::relay::output::Output;
use crate::relay::terminal::{self, RawMode};
use crate::run::error::RunError;
use crate::run::mailbox::Mail;
use crate::run::scene::EXEC;

impl Attendant<'_> {
    /// Whether what the client sends can be taken: what is typed ahead waits for its terminal.
    pub(super) fn has_room(&self) -> bool {
        if self.caller.connection().is_some_and(|c| c.borrow().is_deaf()) {
            return false;
        }
        match &self.input {
            Some(input) => input.has_room(),
            None => self.ended.is_some() || self.scene.terminal.is_none() || self.master.is_some(),
        }
    }

    /// The client has sent something, takes something, or is gone.
    pub(super) fn listen(&mut self) -> Result<(), RunError> {
        let Some(connection) = self.caller.connection() else { return Ok(()) };
        let (mut heard, mut failed) = (Vec::new(), None);
        let has_room = self.has_room();
        {
            let mut connection = connection.borrow_mut();
            if let Err(e) = connection.flush() {
                failed = Some(e);
            }
            let input = &mut self.input;
            let received = match (&failed, has_room) {
                (Some(_), _) => Ok(()),
                (None, true) => connection.receive(|said| heard.push(heard_of(said, input))),
                // Only its leaving wakes us while there is no room.
                (None, false) if connection.is_hung_up() => Err(ConnectionError::Gone),
                (None, false) => Ok(()),
            };
            failed = failed.or(received.err());
        }
        for heard in heard {
            match heard.map_err(RunError::Relay)? {
                Heard::Nothing => {}
                Heard::Signal(signal) => self.pass_on(signal)?,
                // The command learns it as it would have without us: by a closed pipe.
                Heard::ReaderGone(kind) => {
                    let gone = self.outputs.iter_mut().filter(|o| o.is_framed_as(kind));
                    gone.for_each(Output::give_up);
                }
                Heard::Window { rows, columns } => {
                    if let Some(master) = &self.master {
                        terminal::set_size(master, rows, columns).map_err(RunError::relay)?;
                    }
                }
            }
        }
        if failed.is_some() { self.lose_the_client() } else { Ok(()) }
    }

    /// A client that is gone, or that speaks no sense, is a caller that died.
    fn lose_the_client(&mut self) -> Result<(), RunError> {
        self.lost = true;
        self.outputs.iter_mut().for_each(Output::give_up);
        Ok(self.session.order(&Order::Kill { exec: EXEC })?)
    }

    pub(super) fn read_mail(&mut self) -> Result<(), RunError> {
        for mail in self.caller.mail()? {
            match mail {
                Mail::Kill(_) => self.session.order(&Order::Kill { exec: EXEC })?,
                Mail::LauncherDied => return Err(RunError::LauncherDied),
                Mail::ClientGone => self.lose_the_client()?,
                Mail::ReadAhead(bytes) => {
                    if let Some(connection) = self.caller.connection() {
                        connection.borrow_mut().hear(&bytes);
                    }
                }
                Mail::Revoke(id) => {
                    if let Some(index) = self.index_of(&id) {
                        self.revoke(index)?;
                    }
                }
                Mail::RevokeAll => {
                    for index in 0..self.leased.len() {
                        self.revoke(index)?;
                    }
                }
                Mail::Renewed { lease, expires_at, expires_boot } => {
                    if let Some(index) = self.index_of(&lease) {
                        self.leased[index].extend(expires_at, expires_boot, self.scene);
                        self.renewed(index)?;
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn take_terminal(&mut self, master: OwnedFd) -> Result<(), RunError> {
        let dup = || master.try_clone().map_err(RunError::Relay);
        self.outputs.push(output(self.caller, dup()?, Kind::Stdout)?);
        if self.caller.connection().is_some() {
            self.input = Some(Input::fed(dup()?, true).map_err(RunError::Relay)?);
        } else {
            self.raw_mode = RawMode::enter(stdin()).map_err(RunError::relay)?;
            self.input = Some(Input::new(stdin(), dup()?, true).map_err(RunError::Relay)?);
            terminal::follow_size(&[stdin(), stdout(), stderr()], &master)
                .map_err(RunError::relay)?;
        }
        self.master = Some(master);
        self.mask();
        Ok(())
    }

    /// The signals of this process.
    pub(super) fn forward(&mut self) -> Result<(), RunError> {
        while let Some(signal) = self.caller.signal()? {
            if signal != libc::SIGWINCH {
                self.pass_on(signal)?;
            } else if let Some(master) = &self.master {
                let ours = [stdin(), stdout(), stderr()];
                terminal::follow_size(&ours, master).map_err(RunError::relay)?;
            }
        }
        Ok(())
    }

    pub(super) fn pass_on(&mut self, signal: i32) -> Result<(), RunError> {
        if self.ended.is_some() {
            // Only a reader that takes nothing keeps us.
            self.outputs.iter_mut().for_each(Output::give_up);
        } else if self.started {
            self.session.order(&Order::Signal { exec: EXEC, signal })?;
        } else {
            self.waiting_signals.push(signal);
        }
        Ok(())
    }
}

/// What a client said, beyond its input.
enum Heard {
    Nothing,
    Signal(i32),
    Window { rows: u16, columns: u16 },
    ReaderGone(Kind),
}

fn heard_of(said: Said<'_>, input: &mut Option<Input<'_>>) -> std::io::Result<Heard> {
    match (said, input) {
        (Said::Stdin(bytes), Some(input)) => input.feed(bytes).map(|()| Heard::Nothing),
        (Said::EndOfInput, Some(input)) => input.end_feed().map(|()| Heard::Nothing),
        // The command has ended, or its terminal does not stand yet.
        (Said::Stdin(_) | Said::EndOfInput, None) => Ok(Heard::Nothing),
        (Said::Signal(signal), _) => Ok(Heard::Signal(signal)),
        (Said::ReaderGone(kind), _) => Ok(Heard::ReaderGone(kind)),
        (Said::Window { rows, columns }, _) => Ok(Heard::Window { rows, columns }),
    }
}
