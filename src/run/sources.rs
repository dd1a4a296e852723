//! Questions to sources, several at once: a file to be read, a command's output, a minter's answer. Each has
//! its own deadline, which the launcher keeps; one that hangs holds up none of the others, and the asker
//! no longer than that.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use serde::Serialize;

use super::caller::Caller;
use super::error::RunError;
use crate::launcher::client::Session;
use crate::launcher::wire::{Notice, Order, Refusal, RefusalKind, Ticket};
use crate::model::mint::{self, MAX_REPLY, Malformed, Reply};
use crate::model::name::SecretName;
use crate::model::secret::{Growing, MAX_VALUE, Secret};
use crate::sys::clock;
use crate::sys::memory::SharedMapping;

/// Between two looks at a caller who says what can wait.
const A_MOMENT: Duration = Duration::from_millis(20);

/// How long minters that are under way may still answer when the caller wants the end: what they have minted
/// by then can be revoked, and what they have not told cannot.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

pub fn unavailable(name: &SecretName, why: &str, hint: &str) -> RunError {
    RunError::Refused(Refusal {
        kind: RefusalKind::SourceUnavailable,
        message: format!("the source of secret `{name}` is not available: {why}"),
        hint: hint.to_owned(),
    })
}

/// The memory of one request to a minter and of its answer: locked, shared with the minter alone, and wiped
/// when it is dropped.
pub struct Exchange {
    request: SharedMapping,
    reply: SharedMapping,
    fds: [OwnedFd; 2],
}

impl Exchange {
    /// # Errors
    /// The request does not fit, or there is no memory to lock.
    pub fn new<T: Serialize>(request: &T, room: usize) -> io::Result<Self> {
        let memory = |size: usize| -> io::Result<(OwnedFd, SharedMapping)> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let memfd = rustix::fs::memfd_create(c"sublet-mint", flags)?;
            rustix::fs::ftruncate(&memfd, size as u64)?;
            // A minter that cut it short would end us at the next look.
            let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(&memfd, seals)?;
            let mapping = SharedMapping::new(&memfd, size)?;
            Ok((memfd, mapping))
        };
        let (request_fd, mut laid) = memory(room)?;
        let (reply_fd, reply) = memory(MAX_REPLY)?;
        mint::lay(request, laid.bytes_mut()).map_err(io::Error::other)?;
        Ok(Self { request: laid, reply, fds: [request_fd, reply_fd] })
    }

    pub fn reply(&self) -> Result<Reply<'_>, Malformed> {
        mint::read(self.reply.bytes())
    }

    /// The minter is gone: what it was asked with need not be there any longer.
    fn forget_request(&mut self) {
        self.request.wipe();
    }
}

/// What was answered.
pub enum Answer {
    /// A file's content, or what a command printed.
    Printed(Secret),
    Reply(Box<Exchange>),
}

pub struct Question {
    name: SecretName,
    ticket: Ticket,
    state: State,
}

enum State {
    /// The launcher has not said yet.
    Asked,
    Reading(Reading),
    Minting(Box<Exchange>),
    Over(Result<Answer, RunError>),
}

struct Reading {
    /// Until its end.
    file: Option<File>,
    read: Growing,
    /// Its output counts only if it ended well.
    waits_for_end: bool,
}

impl Question {
    /// Of a `file` or `command` source.
    pub fn open(session: &Session, name: &SecretName) -> Result<Self, RunError> {
        let ticket = session.ticket();
        session.order(&Order::OpenSource { secret: name.clone(), ticket })?;
        Ok(Self { name: name.clone(), ticket, state: State::Asked })
    }

    /// Of a source that mints.
    pub fn mint(
        session: &Session,
        name: &SecretName,
        exchange: Exchange,
    ) -> Result<Self, RunError> {
        let ticket = session.ticket();
        let fds = [exchange.fds[0].as_fd(), exchange.fds[1].as_fd()];
        session.order_with(&Order::Mint { secret: name.clone(), ticket }, &fds)?;
        Ok(Self { name: name.clone(), ticket, state: State::Minting(Box::new(exchange)) })
    }

    /// One that needs no asking, or cannot be asked.
    pub fn over(name: &SecretName, why: RunError) -> Self {
        Self { name: name.clone(), ticket: 0, state: State::Over(Err(why)) }
    }

    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// What became of it, once nothing more is to be heard.
    pub fn into_result(self) -> Option<Result<Answer, RunError>> {
        match self.state {
            State::Over(result) => Some(result),
            State::Asked | State::Reading(_) | State::Minting(_) => None,
        }
    }

    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over(_))
    }

    fn waits_for_launcher(&self) -> bool {
        match &self.state {
            State::Asked | State::Minting(_) => true,
            State::Reading(reading) => reading.waits_for_end,
            State::Over(_) => false,
        }
    }

    fn file(&self) -> Option<&File> {
        match &self.state {
            State::Reading(reading) => reading.file.as_ref(),
            State::Asked | State::Minting(_) | State::Over(_) => None,
        }
    }

    /// The launcher speaks of it.
    pub fn hear(&mut self, notice: Notice, mut fds: Vec<OwnedFd>) {
        let state = std::mem::replace(&mut self.state, State::Asked);
        self.state = match (notice, state) {
            (Notice::Source { helper, .. }, State::Asked) => match (fds.pop(), Growing::new()) {
                (Some(fd), Ok(read)) => State::Reading(Reading {
                    file: Some(File::from(fd)),
                    read,
                    waits_for_end: helper,
                }),
                (None, _) => State::Over(Err(RunError::LauncherDied)),
                (_, Err(e)) => State::Over(Err(self.unreadable(&e))),
            },
            (Notice::SourceRefused { refusal, .. }, _) => State::Over(Err(refusal.into())),
            (Notice::SourceEnded { refusal: Some(refusal), .. }, _) => {
                State::Over(Err(refusal.into()))
            }
            (Notice::SourceEnded { .. }, State::Reading(mut reading)) => {
                reading.waits_for_end = false;
                State::Reading(reading)
            }
            (Notice::SourceEnded { .. }, State::Minting(mut exchange)) => {
                exchange.forget_request();
                State::Over(Ok(Answer::Reply(exchange)))
            }
            (_, state) => state,
        };
        self.finish();
    }

    fn read(&mut self) {
        let State::Reading(reading) = &mut self.state else { return };
        let Some(file) = &mut reading.file else { return };
        match reading.read.read_once(file) {
            Ok(true) => {}
            Ok(false) => reading.file = None,
            Err(e) => {
                self.state = State::Over(Err(self.unreadable(&e)));
                return;
            }
        }
        self.finish();
    }

    fn finish(&mut self) {
        if let State::Reading(Reading { file: None, waits_for_end: false, .. }) = &self.state {
            let State::Reading(reading) = std::mem::replace(&mut self.state, State::Asked) else {
                return;
            };
            self.state = State::Over(Ok(Answer::Printed(reading.read.into_secret())));
        }
    }

    fn unreadable(&self, e: &io::Error) -> RunError {
        match e.kind() {
            io::ErrorKind::FileTooLarge => unavailable(
                &self.name,
                &format!("it is larger than {MAX_VALUE} bytes"),
                "lease something smaller",
            ),
            _ => unavailable(&self.name, &e.to_string(), "check the source"),
        }
    }
}

/// Waits for all of them, at most for `patience`. Where there is a `caller`, they can end the wait.
///
/// # Errors
/// Only where the launcher cannot be heard. What became of each question stands in its own result.
pub fn answers(
    session: &Session,
    caller: Option<&Caller>,
    mut questions: Vec<Question>,
    patience: Option<Duration>,
) -> Result<Vec<Result<Answer, RunError>>, RunError> {
    let mut ear = caller;
    let mut until = patience.map(|patience| clock::boottime() + patience);
    let mut pause = false;
    // Something may have come while another question was waited for.
    listen(session, &mut questions)?;
    while questions.iter().any(|question| !question.is_over()) {
        let now = clock::boottime();
        if until.is_some_and(|until| until <= now) {
            break;
        }
        let woken = wait(session, ear.filter(|_| !pause), &questions, until, pause)?;
        pause = false;
        if woken.launcher {
            listen(session, &mut questions)?;
        }
        for index in woken.files {
            questions[index].read();
        }
        if let (true, Some(caller)) = (woken.caller, ear) {
            if !caller.may_want_the_end() {
                // What the caller says can wait, and goes on saying so.
                pause = true;
            } else if let Some(why) = caller.interrupted()? {
                ear = None;
                until = Some(now + LAST_PATIENCE);
                stop(&mut questions, why);
            }
        }
    }
    let gave_up = |question: Question| match question.state {
        State::Over(result) => result,
        _ => Err(unavailable(&question.name, "it did not answer in time", "check the source")),
    };
    Ok(questions.into_iter().map(gave_up).collect())
}

/// Hears what the launcher has said until now of these questions.
fn listen(session: &Session, questions: &mut [Question]) -> Result<(), RunError> {
    loop {
        let of = |notice: &Notice| {
            let ticket = ticket_of(notice)?;
            questions.iter().position(|q| q.ticket == ticket && !q.is_over())
        };
        let Some((notice, fds)) = session.try_notice_of(|notice| of(notice).is_some())? else {
            return Ok(());
        };
        if let Some(index) = of(&notice) {
            questions[index].hear(notice, fds);
        }
    }
}

/// The caller wants the end: only minters are still heard.
fn stop(questions: &mut [Question], why: RunError) {
    let mut why = Some(why);
    for question in questions {
        if matches!(question.state, State::Asked | State::Reading(_)) {
            let why = why.take().unwrap_or_else(|| unavailable(&question.name, "given up", ""));
            question.state = State::Over(Err(why));
        }
    }
}

fn ticket_of(notice: &Notice) -> Option<Ticket> {
    match notice {
        Notice::Source { ticket, .. }
        | Notice::SourceRefused { ticket, .. }
        | Notice::SourceEnded { ticket, .. } => Some(*ticket),
        _ => None,
    }
}

#[derive(Default)]
struct Woken {
    launcher: bool,
    caller: bool,
    files: Vec<usize>,
}

fn wait(
    session: &Session,
    caller: Option<&Caller>,
    questions: &[Question],
    until: Option<Duration>,
    pause: bool,
) -> Result<Woken, RunError> {
    let mut woken = Woken::default();
    let (mut fds, mut of) = (Vec::new(), Vec::new());
    if questions.iter().any(Question::waits_for_launcher) {
        fds.push(PollFd::from_borrowed_fd(session.socket(), PollFlags::IN));
        of.push(None);
    }
    for (index, file) in questions.iter().enumerate().filter_map(|(i, q)| Some((i, q.file()?))) {
        fds.push(PollFd::new(file, PollFlags::IN));
        of.push(Some(index));
    }
    if let Some(caller) = caller {
        fds.push(PollFd::from_borrowed_fd(caller.interrupt(), PollFlags::IN));
    }
    let left = until.map(|until| until.saturating_sub(clock::boottime()));
    let left = [left, pause.then_some(A_MOMENT)].into_iter().flatten().min();
    let timeout =
        left.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(RunError::relay(e)),
    }
    let ready = fds.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty());
    for (index, _) in ready {
        match of.get(index) {
            Some(None) => woken.launcher = true,
            Some(Some(file)) => woken.files.push(*file),
            None => woken.caller = true,
        }
    }
    Ok(woken)
}
