//! What crosses the packet socket between the launcher and the child (later init): fixed-size words,
//! because neither side may allocate there. A failed step is told as (step, errno, which), and rendered
//! by the parent, which has words.
#![forbid(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::sys::socket;

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// One step of the way from clone to exec, in order.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            const ALL: &[Step] = &[$(Step::$name,)*];

            /// What was being done, to follow "could not".
            pub fn doing(self) -> &'static str {
                match self { $(Step::$name => $text,)* }
            }

            fn from_byte(byte: u8) -> Option<Self> {
                Self::ALL.get(usize::from(byte)).copied()
            }
        }
    };
}

steps! {
    MountProcBeforeUserNamespace = "mount a /proc for the new pid namespace from outside the user namespace",
    JoinNetwork = "join the container's network namespace",
    EnterUserNamespace = "enter a new user namespace",
    EnterNetworkNamespace = "enter a new network namespace",
    MountProc = "mount /proc for the new pid namespace",
    AttachRoot = "attach the new root",
    Pivot = "pivot to the new root",
    Hostname = "set the host name",
    Loopback = "bring the loopback interface up",
    DropBoundingSet = "drop the capability bounding set",
    AwaitMaps = "wait for the launcher to write the uid map",
    BecomeUser = "become the exec's user",
    DieWithParent = "ask to die with the launcher",
    CheckLifeline = "check that the launcher still lives",
    MountPts = "mount a private /dev/pts",
    AwaitTrees = "wait for the new root",
    Attach = "attach a mount",
    AwaitPlaces = "wait for the landlock ruleset and the workspace",
    AttachWorkspace = "attach the workspace",
    LandlockRules = "add landlock rules for the new mounts",
    AttachSecrets = "attach the delivery mount",
    DropCapabilities = "drop all capabilities",
    CheckCapabilities = "see that a dropped capability is gone",
    NoNewPrivileges = "set no_new_privs",
    Spawn = "start the command's process",
    Keyring = "join a new session keyring",
    Session = "start a new session",
    WorkingDirectory = "enter the working directory",
    Landlock = "enforce landlock",
    CheckLandlock = "see landlock refuse",
    Seccomp = "install the seccomp filter",
    CheckSeccomp = "see the seccomp filter refuse",
    AwaitCommand = "wait for a command",
    Terminal = "open a pseudo-terminal",
    PlaceStream = "place a standard stream",
    Descriptors = "close every other descriptor",
    AwaitGo = "wait for the launcher's go",
    AwaitInit = "wait for its init to watch",
    PlaceDelivery = "place a delivery's descriptor",
    Environment = "take the environment delivery",
    Limits = "set a resource limit",
    Signals = "unblock signals",
    Exec = "execute the command",
    Init = "run as the exec's init",
}

/// From the child to the launcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// A step failed; nothing of the command ran.
    Failed { step: Step, errno: i32, which: u32 },
    /// It has left the launcher's table of descriptors, where it was cloned to share it.
    Apart,
    /// In a user namespace of its own, and waiting for its maps.
    NeedsMaps,
    /// Everything stands, the command's process is walled in; waiting for the go. Descriptor: the
    /// terminal's master, where there is one.
    Ready,
    /// The command was executed.
    Started,
    /// The command ended with this wait status.
    Ended { wait_status: i32 },
}

/// From the launcher to the child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// The maps are written: who it is inside.
    Maps { uid: u32, gid: u32, drop_groups: bool },
    /// Detached trees, which go where the slate's paths say, those of earlier packets counted.
    Trees,
    /// With it come the landlock ruleset, the workspace's tree and the secrets' mount, where due. The
    /// filter is the command's, by its number among the built-in ones.
    /// `foreign`: strangers made the way to the workspace, and no link of theirs is followed.
    Places { ruleset: bool, workspace: bool, secrets: bool, foreign: bool, filter: u8 },
    /// The command: the slate says what it is. With it come its three streams, if it gets no terminal.
    Command { terminal: Option<(u16, u16)> },
    /// Go. With it come the deliveries that are descriptors, in the slate's order.
    Go,
    /// Send this signal to the command's process group.
    Signal { signal: i32 },
    /// Send this signal to every process of the exec.
    SignalAll { signal: i32 },
}

const WORD: usize = 12;

fn word(tag: u8, small: u8, a: i32, b: u32) -> [u8; WORD] {
    let mut bytes = [0; WORD];
    bytes[0] = tag;
    bytes[1] = small;
    bytes[4..8].copy_from_slice(&a.to_le_bytes());
    bytes[8..].copy_from_slice(&b.to_le_bytes());
    bytes
}

fn parts(bytes: &[u8; WORD]) -> (u8, u8, i32, u32) {
    let a = i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let b = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    (bytes[0], bytes[1], a, b)
}

impl Said {
    fn encode(self) -> [u8; WORD] {
        match self {
            Said::Failed { step, errno, which } => word(b'F', step as u8, errno, which),
            Said::Apart => word(b'A', 0, 0, 0),
            Said::NeedsMaps => word(b'M', 0, 0, 0),
            Said::Ready => word(b'R', 0, 0, 0),
            Said::Started => word(b'S', 0, 0, 0),
            Said::Ended { wait_status } => word(b'E', 0, wait_status, 0),
        }
    }

    fn decode(bytes: &[u8; WORD]) -> Option<Self> {
        Some(match parts(bytes) {
            (b'F', step, errno, which) => {
                Said::Failed { step: Step::from_byte(step)?, errno, which }
            }
            (b'A', ..) => Said::Apart,
            (b'M', ..) => Said::NeedsMaps,
            (b'R', ..) => Said::Ready,
            (b'S', ..) => Said::Started,
            (b'E', _, wait_status, _) => Said::Ended { wait_status },
            _ => return None,
        })
    }
}

impl Told {
    fn encode(self) -> [u8; WORD] {
        match self {
            Told::Maps { uid, gid, drop_groups } => {
                word(b'M', u8::from(drop_groups), uid as i32, gid)
            }
            Told::Trees => word(b'T', 0, 0, 0),
            Told::Places { ruleset, workspace, secrets, foreign, filter } => {
                let flags = u8::from(ruleset)
                    | u8::from(workspace) << 1
                    | u8::from(secrets) << 2
                    | u8::from(foreign) << 3;
                word(b'P', flags, filter.into(), 0)
            }
            Told::Command { terminal } => {
                let (rows, columns) = terminal.unwrap_or_default();
                word(b'C', u8::from(terminal.is_some()), rows.into(), columns.into())
            }
            Told::Go => word(b'G', 0, 0, 0),
            Told::Signal { signal } => word(b'K', 0, signal, 0),
            Told::SignalAll { signal } => word(b'A', 0, signal, 0),
        }
    }

    fn decode(bytes: &[u8; WORD]) -> Option<Self> {
        Some(match parts(bytes) {
            (b'M', drop_groups, uid, gid) => {
                Told::Maps { uid: uid as u32, gid, drop_groups: drop_groups != 0 }
            }
            (b'T', ..) => Told::Trees,
            (b'P', flags, filter, _) => Told::Places {
                ruleset: flags & 1 != 0,
                workspace: flags & 2 != 0,
                secrets: flags & 4 != 0,
                foreign: flags & 8 != 0,
                filter: u8::try_from(filter).ok()?,
            },
            (b'C', terminal, rows, columns) => {
                Told::Command { terminal: (terminal != 0).then_some((rows as u16, columns as u16)) }
            }
            (b'G', ..) => Told::Go,
            (b'K', _, signal, _) => Told::Signal { signal },
            (b'A', _, signal, _) => Told::SignalAll { signal },
            _ => return None,
        })
    }
}

/// Child-side: tells the launcher. Allocates nothing.
pub fn say(socket: BorrowedFd<'_>, said: Said, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    socket::send(socket, &said.encode(), fds)
}

/// Launcher-side: tells the child.
pub fn tell(socket: BorrowedFd<'_>, told: Told, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    socket::send(socket, &told.encode(), fds)
}

/// Launcher-side: the next word of the child, or `None` when it is gone.
pub fn hear(socket: BorrowedFd<'_>, take: impl FnMut(OwnedFd)) -> Result<Option<Said>, Errno> {
    receive(socket, take, Said::decode)
}

/// Child-side: the next word of the launcher, or `None` when it is gone. Allocates nothing.
pub fn listen(socket: BorrowedFd<'_>, take: impl FnMut(OwnedFd)) -> Result<Option<Told>, Errno> {
    receive(socket, take, Told::decode)
}

fn receive<T>(
    socket: BorrowedFd<'_>,
    take: impl FnMut(OwnedFd),
    decode: fn(&[u8; WORD]) -> Option<T>,
) -> Result<Option<T>, Errno> {
    let mut bytes = [0; WORD];
    match socket::receive(socket, &mut bytes, take) {
        Ok(0) | Err(Errno::CONNRESET) => Ok(None),
        Ok(WORD) => decode(&bytes).map(Some).ok_or(Errno::BADMSG),
        Ok(_) => Err(Errno::BADMSG),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_survives_the_socket() {
        for said in [
            Said::Failed { step: Step::Exec, errno: 2, which: 7 },
            Said::Failed { step: Step::MountProcBeforeUserNamespace, errno: 1, which: 0 },
            Said::Apart,
            Said::NeedsMaps,
            Said::Ready,
            Said::Started,
            Said::Ended { wait_status: -1 },
        ] {
            assert_eq!(Said::decode(&said.encode()), Some(said));
        }
        for told in [
            Told::Maps { uid: u32::MAX - 1, gid: 7, drop_groups: true },
            Told::Maps { uid: 0, gid: u32::MAX - 1, drop_groups: false },
            Told::Places {
                ruleset: true,
                workspace: false,
                secrets: true,
                foreign: false,
                filter: 0,
            },
            Told::Places {
                ruleset: false,
                workspace: true,
                secrets: false,
                foreign: true,
                filter: 255,
            },
            Told::Trees,
            Told::Command { terminal: Some((24, u16::MAX)) },
            Told::Command { terminal: None },
            Told::Go,
            Told::Signal { signal: 15 },
            Told::SignalAll { signal: 9 },
        ] {
            assert_eq!(Told::decode(&told.encode()), Some(told));
        }
        assert_eq!(Said::decode(&word(b'F', 255, 0, 0)), None);
        assert_eq!(Told::decode(&[0; WORD]), None);
    }
}
