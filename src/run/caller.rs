//! Who asked for the exec, as the story hears them and writes to them: the process that called
//! `sublet run`, by its streams and signals; or a client of the broker, by its connection.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use super::deliver::{Delivered, Delivery};
use super::entries::Leased;
use super::error::RunError;
use super::mailbox::{Guarded, Mail, Mailbox};
use crate::delivery::fill::Held;
use crate::launcher::client::Session;
use crate::model::id::LeaseId;
use crate::relay::FORWARDED;
use crate::relay::connection::Connection;
use crate::relay::frames::Kind;
use crate::sys::process;

/// How long a client may take for the last of the output, once its exec is over.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

pub enum Caller {
    Process(Signals),
    Client(Client),
}

/// Signals of this process, read from a descriptor from now on.
pub struct Signals(OwnedFd);

type Accept = Box<dyn FnOnce(&mut Connection)>;

/// A client of the broker.
pub struct Client {
    /// Greets it, once all is granted and recorded.
    accept: Option<Accept>,
    /// The process at the other end.
    pub process: Option<OwnedFd>,
    pub mailbox: Mailbox,
    connection: Rc<RefCell<Connection>>,
}

impl Caller {
    /// This process's own signals, from now on.
    pub fn process() -> Result<Self, RunError> {
        let mut signals = vec![libc::SIGWINCH];
        for signal in FORWARDED {
            // A blocked signal reaches its descriptor even where nohup(1) has it ignored.
            if !process::is_ignored(signal).map_err(RunError::Settle)? {
                signals.push(signal);
            }
        }
        Ok(Caller::Process(Signals(process::signalfd(&signals).map_err(RunError::Settle)?)))
    }

    /// All is granted and durable: the client hears of it, and then of all that comes on its stream.
    pub fn accepted(&mut self) {
        if let Caller::Client(client) = self
            && let Some(accept) = client.accept.take()
        {
            accept(&mut client.connection.borrow_mut());
        }
    }

    /// Readable when the caller may want the end of what takes long.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        match self {
            Caller::Process(signals) => signals.0.as_fd(),
            Caller::Client(client) => client.mailbox.fd(),
        }
    }

    /// Whether that may be what the interrupt says. Takes nothing.
    pub fn may_want_the_end(&self) -> bool {
        match self {
            Caller::Process(_) => true,
            Caller::Client(client) => client.mailbox.killed().is_some(),
        }
    }

    /// Whether the caller does want it. A change of the window's size does not count.
    pub fn interrupted(&self) -> Result<Option<RunError>, RunError> {
        match self {
            Caller::Process(signals) => loop {
                match signals.next()? {
                    Some(libc::SIGWINCH) => {}
                    other => return Ok(other.map(RunError::Interrupted)),
                }
            },
            Caller::Client(client) => Ok(client.mailbox.killed()),
        }
    }

    /// The process that asked for this, to end with it. None where it is outside of our pid namespace.
    pub fn parent(&mut self) -> Option<OwnedFd> {
        match self {
            Caller::Client(client) => client.process.take(),
            Caller::Process(_) => {
                let flags = rustix::process::PidfdFlags::empty();
                let parent = rustix::process::getppid()?;
                let pidfd = rustix::process::pidfd_open(parent, flags).ok()?;
                // It may have ended between the two calls, and its number been given away.
                (rustix::process::getppid() == Some(parent)).then_some(pidfd)
            }
        }
    }

    /// What the broker has told this exec.
    pub fn mail(&self) -> Result<impl Iterator<Item = Mail> + use<>, RunError> {
        let mail = match self {
            Caller::Process(_) => Default::default(),
            Caller::Client(client) => client.mailbox.take().map_err(RunError::Relay)?,
        };
        Ok(mail.into_iter())
    }

    /// The client's connection, while it stands.
    pub fn connection(&self) -> Option<&Rc<RefCell<Connection>>> {
        match self {
            Caller::Process(_) => None,
            Caller::Client(client) => Some(&client.connection),
        }
    }

    /// The next signal of this process.
    pub fn signal(&self) -> Result<Option<i32>, RunError> {
        match self {
            Caller::Process(signals) => signals.next(),
            Caller::Client(_) => Ok(None),
        }
    }

    /// From now on a revocation of what these leases delivered wipes it, and is heard of here.
    ///
    /// # Errors
    /// [`RunError::Stopped`] or [`RunError::LauncherDied`]: one has come already, or an order to end.
    pub fn guard(
        &self,
        session: &Session,
        leased: &[Leased],
        delivered: &Delivered,
    ) -> Result<(), RunError> {
        let Caller::Client(client) = self else { return Ok(()) };
        let leases = leased.iter().zip(&delivered.deliveries).map(|(lease, delivery)| {
            let wiper = match delivery {
                Delivery::Held(held) => held.wiper(),
                Delivery::Git { .. } | Delivery::Ssh(_) => None,
            };
            (lease.record.lease_id.clone(), wiper.into_iter().collect())
        });
        let launcher = session.hand().map_err(RunError::Settle)?;
        client.mailbox.guard(Guarded { launcher, leases: leases.collect() });
        client.mailbox.killed().map_or(Ok(()), Err)
    }

    /// A last look before the command may run.
    ///
    /// # Errors
    /// [`RunError::CallerGone`]: the client has closed its connection.
    pub fn refuse_if_gone(&self) -> Result<(), RunError> {
        match self {
            // Its signals wait for the command.
            Caller::Process(_) => Ok(()),
            Caller::Client(client) if client.connection.borrow().is_hung_up() => {
                Err(RunError::CallerGone)
            }
            Caller::Client(_) => Ok(()),
        }
    }

    /// As [`Caller::guard`], of a further version of a delivery, `most` of which are left.
    pub fn guard_also(&self, delivery: usize, held: &Held, most: usize) {
        if let (Caller::Client(client), Some(wiper)) = (self, held.wiper()) {
            client.mailbox.guard_also(delivery, wiper, most);
        }
    }

    /// Whether the lease was taken back under its exec.
    pub fn is_revoked(&self, id: &LeaseId) -> bool {
        match self {
            Caller::Process(_) => false,
            Caller::Client(client) => client.mailbox.is_revoked(id),
        }
    }

    /// The last word to a client: the report, or the error. One that was accepted hears it on its stream,
    /// whatever failed since.
    ///
    /// # Errors
    /// If the client does not take it, which changes nothing any more.
    pub fn finish(self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        let Caller::Client(Client { connection, accept: None, .. }) = self else {
            return Ok(());
        };
        match Rc::try_unwrap(connection) {
            Ok(connection) => connection
                .into_inner()
                .finish(kind, payload, LAST_PATIENCE)
                .map_err(io::Error::other),
            Err(_) => Err(io::Error::other("the client's connection is still in use")),
        }
    }
}

impl Client {
    pub fn new(
        accept: impl FnOnce(&mut Connection) + 'static,
        connection: Connection,
        process: Option<OwnedFd>,
        mailbox: Mailbox,
    ) -> Self {
        Self {
            accept: Some(Box::new(accept)),
            process,
            mailbox,
            connection: Rc::new(RefCell::new(connection)),
        }
    }
}

impl Signals {
    fn next(&self) -> Result<Option<i32>, RunError> {
        process::read_signal(&self.0).map_err(RunError::Relay)
    }
}
