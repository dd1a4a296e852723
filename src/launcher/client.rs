//! The broker's side: forks the launcher, gives orders, reads notices.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::serve;
use super::wire::{self, Notice, Order, Refusal, Ticket, WireError};
use crate::host::{Places, Trust};
use crate::model::id::ExecId;
use crate::sys::cpu;
use crate::sys::process::{self, Forked};
use crate::sys::socket;

/// How long the launcher has to end its execs: longer than it waits for them itself.
const LAST_WAIT: Timespec = Timespec { tv_sec: 6, tv_nsec: 0 };

/// The launcher as the broker has it. Dropping it ends the launcher, and every exec with it; where one of
/// the root session still lives, not before it is gone.
pub struct Launcher {
    root: Session,
    pid: i32,
}

/// One session with the launcher: orders go, notices come. Dropped with every [`Hand`] of it, its execs die.
pub struct Session {
    socket: OwnedFd,
    /// The other end, and where to hand it over: after the first order, so that the launcher wakes once.
    unopened: RefCell<Option<(OwnedFd, OwnedFd)>>,
    /// Execs that were ordered and have not ended.
    live: Cell<u32>,
    tickets: Cell<Ticket>,
    passed_over: RefCell<VecDeque<(Notice, Vec<OwnedFd>)>>,
    /// Why the launcher has ended, once it has said so: the answer to all that is asked of it since.
    unsettled: RefCell<Option<Refusal>>,
}

/// A launcher that is not yet told where this host keeps things. It has begun with what does not hang on that.
pub struct Unsettled(Launcher);

#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    #[error("could not fork the launcher")]
    Fork(#[from] io::Error),
    #[error("the launcher ended before it was told anything")]
    Settle(#[from] WireError),
}

impl Unsettled {
    pub fn settle(self, places: &Places) -> Result<Launcher, ForkError> {
        self.0.root.order(&Order::Settle(places.clone()))?;
        Ok(self.0)
    }
}

impl Launcher {
    /// Forks the launcher and lets it settle.
    pub fn fork(places: &Places, trust: Trust) -> Result<Self, ForkError> {
        Self::begin(trust, None)?.settle(places)
    }

    /// Forks the launcher: before any secret is loaded, and before any thread exists.
    ///
    /// `ahead`: the exec that will be asked for. What every exec needs is begun at once, under its name.
    pub fn begin(trust: Trust, ahead: Option<&ExecId>) -> Result<Unsettled, ForkError> {
        let (ours, theirs) = socket::packet_pair().map_err(io::Error::from)?;
        cpu::learn();
        let here = cpu::current();
        match process::fork()? {
            Forked::Child => {
                match cpu::leave_to_waker(here) {
                    Ok(()) | Err(_) => {}
                }
                drop(ours);
                process::exit_now(serve::run(theirs, trust, ahead))
            }
            Forked::Parent { pid } => {
                // Only speed hangs on it, and a cpuset may forbid it.
                match cpu::start_elsewhere(pid) {
                    Ok(()) | Err(_) => {}
                }
                Ok(Unsettled(Self { root: Session::new(ours), pid }))
            }
        }
    }

    /// The session that lasts as long as the launcher.
    pub fn root(&self) -> &Session {
        &self.root
    }

    /// What opens further sessions, from any thread.
    pub fn door(&self) -> io::Result<Door> {
        Ok(Door(self.root.socket.try_clone()?))
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }
}

/// Gives orders on a session that another thread listens to.
#[derive(Debug)]
pub struct Hand(OwnedFd);

impl From<OwnedFd> for Hand {
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl Hand {
    pub fn order(&self, order: &Order) -> Result<(), WireError> {
        wire::send(self.0.as_fd(), order, &[])
    }
}

/// Opens sessions.
pub struct Door(OwnedFd);

impl Door {
    /// The launcher hears of it with its first order.
    pub fn open(&self) -> Result<Session, WireError> {
        let failed = |e: io::Error| WireError::Send(e);
        let (ours, theirs) = socket::packet_pair().map_err(|e| failed(e.into()))?;
        let door = self.0.try_clone().map_err(failed)?;
        Ok(Session { unopened: RefCell::new(Some((theirs, door))), ..Session::new(ours) })
    }
}

impl Session {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            unopened: RefCell::default(),
            live: Cell::default(),
            tickets: Cell::default(),
            passed_over: RefCell::default(),
            unsettled: RefCell::default(),
        }
    }

    pub fn order(&self, order: &Order) -> Result<(), WireError> {
        self.order_with(order, &[])
    }

    /// An order with descriptors beside it.
    pub fn order_with(&self, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<(), WireError> {
        if matches!(order, Order::Prepare(_)) {
            self.live.set(self.live.get() + 1);
        }
        match wire::send(self.socket.as_fd(), order, fds).and_then(|()| self.hand_over()) {
            // Perhaps it has said why.
            Err(WireError::Gone) => match self.receive() {
                Err(unsettled @ WireError::Unsettled(_)) => Err(unsettled),
                _ => Err(WireError::Gone),
            },
            sent => sent,
        }
    }

    fn hand_over(&self) -> Result<(), WireError> {
        match self.unopened.take() {
            Some((theirs, door)) => wire::send(door.as_fd(), &Order::Session, &[theirs.as_fd()]),
            None => Ok(()),
        }
    }

    /// Ends it for whoever else still holds a [`Hand`] of it: its execs die.
    pub fn end(&self) {
        match rustix::net::shutdown(&self.socket, Shutdown::Both) {
            Ok(()) | Err(_) => {}
        }
    }

    /// What gives orders on this session from another thread.
    pub fn hand(&self) -> io::Result<Hand> {
        Ok(Hand(self.socket.try_clone()?))
    }

    /// A number that no question on this session has had, and none has for long.
    pub fn ticket(&self) -> Ticket {
        let ticket = self.tickets.get().wrapping_add(1).max(1);
        self.tickets.set(ticket);
        ticket
    }

    /// A notice that is wanted, if one was passed over or is the next on the socket, which must be readable
    /// else: another is passed over.
    pub fn try_notice_of(
        &self,
        wanted: impl Fn(&Notice) -> bool,
    ) -> Result<Option<(Notice, Vec<OwnedFd>)>, WireError> {
        let mut passed_over = self.passed_over.borrow_mut();
        if let Some(index) = passed_over.iter().position(|(notice, _)| wanted(notice)) {
            return Ok(passed_over.remove(index));
        }
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&now)) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(e) => return Err(WireError::Receive(e.into())),
        }
        let received = self.receive()?;
        if wanted(&received.0) {
            return Ok(Some(received));
        }
        passed_over.push_back(received);
        Ok(None)
    }

    /// The next notice, however long it takes: an earlier one that was passed over, else a new one.
    pub fn notice(&self) -> Result<(Notice, Vec<OwnedFd>), WireError> {
        if let Some(passed) = self.passed_over.borrow_mut().pop_front() {
            return Ok(passed);
        }
        self.receive()
    }

    fn receive(&self) -> Result<(Notice, Vec<OwnedFd>), WireError> {
        self.hand_over()?;
        let received = match wire::receive(self.socket.as_fd()) {
            Err(WireError::Gone) => {
                let why = self.unsettled.borrow().clone();
                return Err(why.map_or(WireError::Gone, WireError::Unsettled));
            }
            received => received?,
        };
        if let (Notice::Unsettled { refusal }, _) = received {
            *self.unsettled.borrow_mut() = Some(refusal.clone());
            return Err(WireError::Unsettled(refusal));
        }
        if matches!(received.0, Notice::Ended { .. } | Notice::Refused { .. }) {
            self.live.set(self.live.get().saturating_sub(1));
        }
        Ok(received)
    }

    /// The next notice that is wanted; others wait for [`Session::notice`].
    pub fn notice_of(
        &self,
        wanted: impl Fn(&Notice) -> bool,
    ) -> Result<(Notice, Vec<OwnedFd>), WireError> {
        let mut passed_over = self.passed_over.borrow_mut();
        if let Some(index) = passed_over.iter().position(|(notice, _)| wanted(notice))
            && let Some(found) = passed_over.remove(index)
        {
            return Ok(found);
        }
        loop {
            let received = self.receive()?;
            // An exec that is refused ends every wait for it.
            if wanted(&received.0) {
                return Ok(received);
            }
            passed_over.push_back(received);
        }
    }

    /// Leaves a notice that was looked at for [`Session::notice`].
    pub fn pass_over(&self, seen: (Notice, Vec<OwnedFd>)) {
        self.passed_over.borrow_mut().push_back(seen);
    }

    /// Whether [`Session::notice`] has something without waiting for the socket.
    pub fn has_passed_over(&self) -> bool {
        !self.passed_over.borrow().is_empty()
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        if self.root.live.get() == 0 {
            return;
        }
        let waited = rustix::net::shutdown(&self.root.socket, Shutdown::Both).and_then(|()| {
            let pid = Pid::from_raw(self.pid).ok_or(Errno::SRCH)?;
            let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
            poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&LAST_WAIT))
        });
        match waited {
            // It may be dead and reaped already.
            Ok(1..) | Err(Errno::SRCH | Errno::NOTCONN) => {}
            Ok(0) => eprintln!("sublet: the launcher is still ending an exec\r"),
            Err(e) => eprintln!("sublet: could not wait for the launcher's end: {e}\r"),
        }
    }
}
