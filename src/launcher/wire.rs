//! The packets between broker and launcher: postcard in a packet socket, descriptors beside it. What
//! does not fit a packet travels in a memfd. A packet that does not decode ends the connection.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::into::InContainer;
use super::into::program::Found;
use crate::host::{Places, ProfileRef};
use crate::model::id::{ExecId, RunId};
use crate::model::name::{AudienceName, Channel, SecretName, VariableName};
use crate::model::path_bytes;
use crate::model::report::Posture;
use crate::profile::identity::{Identity, IdentityKind};
use crate::sys::socket;

/// The largest message, in a memfd: argv and environment together may reach 2 MiB (execve(2)).
const MAX_MESSAGE: usize = 8 << 20;
/// The largest packet.
const MAX_PACKET: usize = 4 << 10;

/// The exec, among those of one launcher.
pub type ExecNumber = u32;

/// A question to a source, among those of one session.
pub type Ticket = u32;

/// One delivery that the exec shall have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeliverySpec {
    pub channel: Channel,
    /// `env`: the variable. `file`: the file's name, and `NAME_FILE`. `memfd`: `NAME_FD`.
    pub variable: VariableName,
    /// On the `git` channel: what the helper is named for.
    pub git: Option<GitSpec>,
    /// On the `token` channel: how it is presented.
    pub token: Option<TokenSpec>,
    /// On `file`: the value is asked for at an address of the exec's own loopback, where the broker answers;
    /// the file holds what it is asked with.
    pub endpoint: bool,
}

/// A workload identity: whose libraries read it, and what they are told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenSpec {
    pub kind: IdentityKind,
    /// Of [`IdentityKind::variables`].
    pub variables: Vec<(String, String)>,
    /// The content of the file beside it, where the kind has one.
    pub document: Option<String>,
}

impl TokenSpec {
    pub fn of(identity: &Identity, session: &str) -> Self {
        let variables = identity.variables(session);
        Self {
            kind: identity.kind,
            variables: variables
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            document: identity.document().map(|(_, content)| content),
        }
    }
}

/// Where an exec asks for its credential: its network namespace is new, and nobody else's.
pub const ENDPOINT_PORT: u16 = 8127;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitSpec {
    pub protocol: String,
    pub host: AudienceName,
}

/// Everything that the launcher needs to compile a plan; it finds out the rest by itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prepare {
    pub exec: ExecNumber,
    pub exec_id: ExecId,
    pub run_id: RunId,
    pub profile: ProfileRef,
    #[serde(with = "path_bytes")]
    pub workspace: PathBuf,
    pub argv: Vec<Vec<u8>>,
    /// Where argv[0] was resolved to when the command was matched: executed and nothing else.
    #[serde(with = "path_bytes::option")]
    pub program: Option<PathBuf>,
    /// The command's own environment, from flags, beside the profile's.
    pub environment: Vec<(VariableName, Vec<u8>)>,
    /// Narrows the profile's network to none.
    pub without_network: bool,
    /// Rows and columns of a new pseudo-terminal.
    pub terminal: Option<(u16, u16)>,
    pub deliveries: Vec<DeliverySpec>,
    /// The command is an agent's: it may ask the broker of its run, if there is one.
    pub agent: bool,
    /// The invoker's home, for `~/` in profiles.
    #[serde(with = "path_bytes::option")]
    pub home: Option<PathBuf>,
    /// What is asked of an exec in a container.
    pub into: InContainer,
    /// The CPU on which the broker goes on meanwhile.
    pub cpu: u32,
}

/// What an order says of the sandbox: two with the same get the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    pub run_id: RunId,
    pub profile: ProfileRef,
    #[serde(with = "path_bytes")]
    pub workspace: PathBuf,
    pub without_network: bool,
    #[serde(with = "path_bytes::option")]
    pub home: Option<PathBuf>,
    /// This sublet is shown inside, for a command that asks it for credentials.
    pub binary: bool,
    /// The broker's socket for this run is shown inside, if there is one.
    pub agent: bool,
    /// What is asked of an exec in a container.
    pub into: InContainer,
}

impl Spec {
    pub fn of(prepare: &Prepare) -> Self {
        Self {
            run_id: prepare.run_id.clone(),
            profile: prepare.profile.clone(),
            workspace: prepare.workspace.clone(),
            without_network: prepare.without_network,
            home: prepare.home.clone(),
            binary: prepare.deliveries.iter().any(|d| d.channel == Channel::Git),
            agent: prepare.agent,
            into: prepare.into.clone(),
        }
    }
}

/// What is known of an exec before it is decided on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ahead {
    pub spec: Spec,
    /// The CPU on which the broker goes on meanwhile.
    pub cpu: u32,
}

/// Which file a command is in a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Find {
    pub run_id: RunId,
    pub profile: ProfileRef,
    #[serde(with = "path_bytes")]
    pub workspace: PathBuf,
    #[serde(with = "path_bytes::option")]
    pub home: Option<PathBuf>,
    pub into: InContainer,
    /// argv\[0\].
    pub name: Vec<u8>,
}

/// How one delivery was filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilledSpec {
    pub bytes: u32,
    /// `CLOCK_BOOTTIME` at which it is wiped, whatever else happens.
    pub expires: Duration,
    /// Whether its end is the exec's end.
    pub kill: bool,
}

/// From the broker.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Compile the plan, make containers, build the sandbox; run nothing.
    Prepare(Box<Prepare>),
    /// The deliveries are filled: run the command. `deadline` is a `CLOCK_BOOTTIME`.
    Start { exec: ExecNumber, deliveries: Vec<FilledSpec>, deadline: Option<Duration> },
    /// Forward a signal to the command.
    Signal { exec: ExecNumber, signal: i32 },
    /// A lease was renewed: its delivery stays until this `CLOCK_BOOTTIME`.
    Extend { exec: ExecNumber, delivery: u32, expires: Duration },
    /// Wipe one delivery now; kill the exec with it if it was started so.
    Revoke { exec: ExecNumber, delivery: u32 },
    /// Kill the exec, whatever it is at.
    Kill { exec: ExecNumber },
    /// Open a `file` source, or run a `command` source and give its standard output. The ticket is on
    /// every notice that answers.
    OpenSource { secret: SecretName, ticket: Ticket },
    /// Root session only: open a further session on the descriptor that comes along. It has execs of
    /// its own numbers, and they live no longer than it.
    Session,
    /// Root session only: keep the trail's head, encoded, outside the database.
    KeepHead { head: Vec<u8> },
    /// Compile the plan and describe it; build and run nothing.
    Explain(Box<Prepare>),
    /// Make an empty file that shall stand in the place of a `token` delivery.
    Replace { exec: ExecNumber, delivery: u32 },
    /// It is filled: put it there.
    Replaced { exec: ExecNumber, delivery: u32, bytes: u32 },
    /// Say which file of the container a command is, before its plan is asked for.
    Find(Box<Find>),
    /// Start a minter for this source. Descriptors: the request's memory and the answer's, which are the
    /// broker's business and the minter's. Answered by `SourceEnded`, or `SourceRefused`.
    Mint { secret: SecretName, ticket: Ticket },
    /// The first, and then no more: where this host keeps things. What the launcher reads, it reads there by
    /// itself.
    Settle(Places),
    /// The session's exec is being decided on: build the sandbox that it will want. Nothing is told of it; what
    /// was built is used by a `Prepare` that wants the same, and given back else.
    Ahead(Box<Ahead>),
}

/// What failed, in words: the launcher knows the step, the path and the likely cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub kind: RefusalKind,
    /// What failed, on what, why.
    pub message: String,
    /// What to try.
    pub hint: String,
}

/// How the caller treats a refusal: which exit status, which name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// The launcher could not build what was asked for.
    Launch,
    /// No mechanism gives an effect that the profile asks for.
    ProtectionUnavailable,
    /// A delivery container could not be made.
    DeliveryUnavailable,
    /// A source could not be opened.
    SourceUnavailable,
    /// What was asked for is wrong: profile, workspace, environment.
    Invalid,
    /// The command was found, and is not executable.
    NotExecutable,
    /// The command was not found.
    NotFound,
}

/// How an exec ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The command's own wait status.
    Command { wait_status: i32 },
    /// The tree was killed from outside before the command's end was heard.
    Killed,
}

/// From the launcher.
#[derive(Debug, Serialize, Deserialize)]
pub enum Notice {
    /// The launcher cannot work on this host at all, and ends.
    Unsettled {
        refusal: Refusal,
    },
    /// Containers stand. Descriptors: stdin, stdout, stderr of the command where it has no terminal,
    /// then one a delivery. `uid` is the exec's on the host.
    Prepared {
        exec: ExecNumber,
        uid: u32,
    },
    /// Nothing of the command ran. The exec is forgotten.
    Refused {
        exec: ExecNumber,
        refusal: Refusal,
    },
    /// Everything stands but the deliveries. Descriptors: the terminal's master, where there is one; then,
    /// with `endpoint`, a socket that listens on the exec's own loopback.
    Ready {
        exec: ExecNumber,
        posture: Posture,
        endpoint: bool,
    },
    Started {
        exec: ExecNumber,
    },
    /// A delivery was wiped before the exec's end, because it expired.
    Expired {
        exec: ExecNumber,
        delivery: u32,
    },
    /// The deadline has passed; the tree is being ended.
    TimedOut {
        exec: ExecNumber,
    },
    /// The command has ended, and every delivery is wiped; what is left of the tree is being killed.
    Ending {
        exec: ExecNumber,
        ending: Ending,
        deliveries: Vec<(u64, bool)>,
    },
    /// No process of the exec is left, and every delivery is wiped. Per delivery: its bytes, and
    /// whether they were wiped. The exec is forgotten.
    Ended {
        exec: ExecNumber,
        ending: Ending,
        deliveries: Vec<(u64, bool)>,
    },
    /// Descriptor: the source's bytes to read. With `helper`, its end is told afterwards.
    Source {
        ticket: Ticket,
        helper: bool,
    },
    SourceRefused {
        ticket: Ticket,
        refusal: Refusal,
    },
    /// The command of a `command` source, or a minter, is gone; a refusal if its output is not to be used.
    SourceEnded {
        ticket: Ticket,
        refusal: Option<Refusal>,
    },
    HeadKept {
        refusal: Option<Refusal>,
    },
    Explained {
        explanation: Result<Explanation, Refusal>,
    },
    /// Descriptor: the file for a token's next version, unless it was refused.
    Replacement {
        exec: ExecNumber,
        delivery: u32,
        refusal: Option<Refusal>,
    },
    /// Of a command in a container.
    Found {
        found: Result<Option<Found>, Refusal>,
    },
}

/// What `--explain` shows of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub mode: String,
    pub inside_uid: u32,
    pub inside_gid: u32,
    pub outside_uid: String,
    pub namespaces: Vec<String>,
    pub mounts: Vec<String>,
    pub landlock_abi: u32,
    pub landlock: Vec<String>,
    pub filter: Vec<String>,
    pub limits: Vec<String>,
    pub environment: Vec<String>,
    pub command: Vec<String>,
    pub posture: Posture,
}

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the other side is gone")]
    Gone,
    /// Only from a launcher.
    #[error(transparent)]
    Unsettled(Refusal),
    #[error("could not send to the other side")]
    Send(#[source] io::Error),
    #[error("could not receive from the other side")]
    Receive(#[source] io::Error),
    #[error("a message came in a descriptor that is no memfd")]
    NoMemfd(#[source] Errno),
    #[error("a message of {0} bytes is larger than either side takes")]
    TooLarge(usize),
    #[error("a message does not decode")]
    Malformed(#[source] postcard::Error),
}

/// The first byte of a packet.
const INLINE: u8 = 0;
const IN_MEMFD: u8 = 1;

/// Sends one message with its descriptors.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), WireError> {
    let mut packet = vec![INLINE];
    packet = postcard::to_extend(message, packet).map_err(WireError::Malformed)?;
    if packet.len() <= MAX_PACKET {
        return sent(socket::send(socket, &packet, fds));
    }
    if packet.len() > MAX_MESSAGE {
        return Err(WireError::TooLarge(packet.len()));
    }
    let memfd = rustix::fs::memfd_create(c"sublet-wire", MemfdFlags::CLOEXEC)
        .map_err(|e| WireError::Send(e.into()))?;
    File::from(memfd.try_clone().map_err(WireError::Send)?)
        .write_all(&packet[1..])
        .map_err(WireError::Send)?;
    let mut all = vec![memfd.as_fd()];
    all.extend_from_slice(fds);
    sent(socket::send(socket, &[IN_MEMFD], &all))
}

fn sent(result: Result<(), Errno>) -> Result<(), WireError> {
    match result {
        Ok(()) => Ok(()),
        Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(WireError::Gone),
        Err(e) => Err(WireError::Send(e.into())),
    }
}

/// Receives one message with its descriptors.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<(T, Vec<OwnedFd>), WireError> {
    let mut packet = vec![0; MAX_PACKET];
    let mut fds = Vec::new();
    let size = match socket::receive(socket, &mut packet, |fd| fds.push(fd)) {
        Ok(0) | Err(Errno::CONNRESET) => return Err(WireError::Gone),
        Ok(size) => size,
        Err(e) => return Err(WireError::Receive(e.into())),
    };
    match packet[0] {
        INLINE => Ok((decode(&packet[1..size])?, fds)),
        IN_MEMFD if size == 1 && !fds.is_empty() => {
            let mut file = File::from(fds.remove(0));
            // A read of anything else may wait for ever: an eventfd even takes lseek(2). Only files of
            // tmpfs have seals, F_GET_SEALS in fcntl(2).
            rustix::fs::fcntl_get_seals(&file).map_err(WireError::NoMemfd)?;
            file.rewind().map_err(WireError::Receive)?;
            let mut bytes = Vec::new();
            file.take(MAX_MESSAGE as u64 + 1)
                .read_to_end(&mut bytes)
                .map_err(WireError::Receive)?;
            if bytes.len() > MAX_MESSAGE {
                return Err(WireError::TooLarge(bytes.len()));
            }
            Ok((decode(&bytes)?, fds))
        }
        _ => Err(WireError::Malformed(postcard::Error::DeserializeBadEncoding)),
    }
}

/// One message from its bytes; nothing may follow it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(bytes).map_err(WireError::Malformed)? {
        (message, []) => Ok(message),
        _ => Err(WireError::Malformed(postcard::Error::DeserializeBadEncoding)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_messages_arrive_whole_with_their_descriptors() {
        let (a, b) = socket::packet_pair().unwrap();
        for size in [1, MAX_PACKET, 3 << 20] {
            let order = Order::KeepHead { head: vec![7; size] };
            send(a.as_fd(), &order, &[a.as_fd()]).unwrap();
            let (got, fds): (Order, _) = receive(b.as_fd()).unwrap();
            assert!(matches!(got, Order::KeepHead { head } if head.len() == size));
            assert_eq!(fds.len(), 1);
        }
        drop(a);
        assert!(matches!(receive::<Order>(b.as_fd()), Err(WireError::Gone)));
    }

    #[test]
    fn a_message_is_read_from_a_memfd_alone() {
        #[track_caller]
        fn check(with: OwnedFd, expected: bool) {
            let (a, b) = socket::packet_pair().unwrap();
            socket::send(&a, &[IN_MEMFD], &[with.as_fd()]).unwrap();
            drop((a, with));
            let got = receive::<Order>(b.as_fd());
            assert_eq!(got.is_ok(), expected);
            assert!(expected || matches!(got, Err(WireError::NoMemfd(_))));
        }
        let memfd = rustix::fs::memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(memfd);
        file.write_all(&postcard::to_stdvec(&Order::Kill { exec: 1 }).unwrap()).unwrap();
        check(file.into(), true);
        // It takes lseek(2), and reading it waits until somebody adds to it.
        let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        check(eventfd.unwrap(), false);
        // So does a pipe whose writer stays, but for the lseek.
        let (reader, _writer) = std::io::pipe().unwrap();
        check(reader.into(), false);
        check(File::open("/").unwrap().into(), false);
    }

    #[test]
    fn what_does_not_decode_is_refused() {
        assert!(decode::<Order>(&[250, 1, 2]).is_err());
        assert!(decode::<Order>(&[]).is_err());
        let mut bytes = postcard::to_stdvec(&Order::Kill { exec: 1 }).unwrap();
        bytes.push(0);
        assert!(decode::<Order>(&bytes).is_err(), "trailing bytes");
    }
}
