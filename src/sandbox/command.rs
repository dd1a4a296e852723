//! The command's process, from its start to execve. It shares init's memory until it executes: puts every
//! wall around itself, and only then takes its command, its streams, the go and its deliveries.
//!
//! As in `child.rs`, nothing here may allocate, lock, panic or decide.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::futex;

use super::child::{At, Failure, Handover, errno, fail, must_refuse, slate};
use super::init::{self, Children};
use super::plan::{Plan, WORKING_DIRECTORY, lists};
use super::seccomp::BuiltIn;
use super::step::{Said, Step, Told, listen, say};
use crate::sys::exec::ReadMapping;
use crate::sys::slice::Slice;
use crate::sys::socket::MAX_FDS;
use crate::sys::{cpu, ids, landlock, process, seccomp};

/// Standard input, output and error.
const STREAMS: usize = 3;

/// Descriptors are first lifted to here, so that placing one never overwrites another.
const LIFTED: RawFd = (STREAMS + MAX_FDS) as RawFd;

/// What the command's process gets; it shares this memory until it has executed.
struct Command<'a> {
    plan: &'a Plan,
    ruleset: Option<&'a OwnedFd>,
    filter: BuiltIn,
    /// Environment deliveries are mapped, not read: execve copies from the sealed memfd's own pages, and
    /// no other copy ever stands in this memory. Unmapped by init, when the command has executed.
    mappings: [Cell<Option<ReadMapping>>; MAX_FDS],
    /// It came as far as an execve that did not return.
    executed: Cell<bool>,
    /// 1 once init watches: what is executed sooner could take from it what it still needs.
    watched: AtomicU32,
}

/// Starts the command, and makes its init of this process meanwhile. `None` if it could not be executed,
/// which it has then said itself.
pub(super) fn spawn(
    plan: &Plan,
    ruleset: Option<OwnedFd>,
    filter: BuiltIn,
) -> Result<Option<(i32, Children)>, Failure> {
    let command = Command {
        plan,
        ruleset: ruleset.as_ref(),
        filter,
        mappings: [const { Cell::new(None) }; MAX_FDS],
        executed: Cell::new(false),
        watched: AtomicU32::new(0),
    };
    let lifeline = plan.lifeline.as_fd();
    let mut children = None;
    let pid = process::spawn_until_exec(command_entry, &command, |executed| {
        init::wait_for_either(executed, lifeline)?;
        if rustix::io::read(executed, &mut [0])? > 0 {
            // It stands behind its walls.
            children =
                Some(init::prepare(plan, [Some(executed), ruleset.as_ref().map(AsFd::as_fd)])?);
            command.watched.store(1, Ordering::Release);
            futex::wake(&command.watched, futex::Flags::PRIVATE, 1)?;
            init::wait_for_either(executed, lifeline)?;
        }
        Ok(())
    })
    .at(Step::Spawn)?;
    if !command.executed.get() {
        return Ok(None);
    }
    say(plan.socket.as_fd(), Said::Started, &[]).at(Step::Spawn)?;
    Ok(children.map(|children| (pid, children)))
}

fn command_entry(command: &Command<'_>, executed: BorrowedFd<'_>) -> i32 {
    let kept = match Kept::of(command, executed) {
        Ok(kept) => kept,
        Err(failure) => fail(command.plan.socket.as_fd(), &failure),
    };
    let failure = match become_command(command, &kept) {
        Ok(()) => execute(command),
        Err(failure) => failure,
    };
    fail(kept.socket.as_fd(), &failure)
}

/// What is still needed after the low numbers have been given away.
struct Kept {
    socket: OwnedFd,
    /// Init reads from it that the walls stand, and at its end that the command has executed.
    executed: OwnedFd,
}

impl Kept {
    fn of(command: &Command<'_>, executed: BorrowedFd<'_>) -> Result<Self, Failure> {
        let lift = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, LIFTED);
        Ok(Self {
            socket: lift(command.plan.socket.as_fd()).at(Step::Descriptors)?,
            executed: lift(executed).at(Step::Descriptors)?,
        })
    }
}

fn become_command(command: &Command<'_>, kept: &Kept) -> Result<(), Failure> {
    process::join_new_session_keyring().at(Step::Keyring)?;
    rustix::process::setsid().at(Step::Session)?;
    rustix::process::umask(command.plan.umask);
    // Only speed hangs on it.
    match command.plan.slice.as_ref().map(Slice::ask) {
        Some(Ok(()) | Err(_)) | None => {}
    }
    cpu::go_anywhere();
    let slate = slate(command.plan).at(Step::WorkingDirectory)?;
    let working_directory = slate.string(lists::PLACES, WORKING_DIRECTORY);
    rustix::process::chdir(working_directory.at(Step::WorkingDirectory)?)
        .at(Step::WorkingDirectory)?;

    if let Some(ruleset) = command.ruleset {
        landlock::restrict_self(ruleset).at(Step::Landlock)?;
        // Readable by its mode and its mount; no landlock rule covers it.
        let probe = rustix::fs::open(super::layout::LANDLOCK_PROBE, OFlags::CLOEXEC, Mode::empty());
        must_refuse(probe, Errno::ACCESS).at(Step::CheckLandlock)?;
    }
    errno(seccomp::install(command.filter.program())).at(Step::Seccomp)?;
    errno(seccomp::see_it_refused()).at(Step::CheckSeccomp)?;

    // The walls stand. What follows are calls that every command needs to be of any use.
    rustix::io::write(&kept.executed, &[0]).at(Step::Spawn)?;
    let socket = kept.socket.as_fd();
    let mut streams = Handover::empty();
    let terminal = match listen(socket, |fd| streams.push(fd)).at(Step::AwaitCommand)? {
        Some(Told::Command { terminal }) => terminal,
        Some(_) => return Err(Errno::PROTO).at(Step::AwaitCommand),
        None => return Err(Errno::PIPE).at(Step::AwaitCommand),
    };
    match terminal {
        None => {
            place_streams([streams.nth(0), streams.nth(1), streams.nth(2)])?;
            say(socket, Said::Ready, &[])
        }
        Some((rows, columns)) => {
            let (master, slave) = open_terminal(rows, columns).at(Step::Terminal)?;
            // Above the low numbers, of which it may have one.
            let kept = rustix::io::fcntl_dupfd_cloexec(&master, LIFTED).at(Step::Terminal)?;
            place_streams([Ok(slave.as_fd()); STREAMS])?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).at(Step::Terminal)?;
            std::mem::forget((master, slave));
            say(socket, Said::Ready, &[kept.as_fd()])
        }
    }
    .at(Step::AwaitGo)?;
    // Closed by exec, as all that came: some of their numbers are others' by now.
    std::mem::forget(streams);

    let mut deliveries = Handover::empty();
    match listen(socket, |fd| deliveries.push(fd)).at(Step::AwaitGo)? {
        Some(Told::Go) => {}
        Some(_) => return Err(Errno::PROTO).at(Step::AwaitGo),
        None => return Err(Errno::PIPE).at(Step::AwaitGo),
    }
    await_init(&command.watched).at(Step::AwaitInit)?;
    take_deliveries(command, &deliveries)?;
    std::mem::forget(deliveries);
    // After the descriptors, which may have larger numbers than their limit.
    for index in 0..slate.count(lists::LIMITS) / 3 {
        let number = |part| slate.number(lists::LIMITS, 3 * index + part);
        let (resource, soft, hard) =
            (number(0).at(Step::Limits)?, number(1).at(Step::Limits)?, number(2).at(Step::Limits)?);
        ids::limit(resource as u32, soft as u64, hard as u64).at_nth(Step::Limits, index)?;
    }
    process::unblock_signals().at(Step::Signals)
}

/// As a rule it has been watching for long. One that cannot ends, and this process with it.
fn await_init(watched: &AtomicU32) -> Result<(), Errno> {
    while watched.load(Ordering::Acquire) == 0 {
        match futex::wait(watched, futex::Flags::PRIVATE, 0, None) {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn open_terminal(rows: u16, columns: u16) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open(c"/dev/pts/ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC,
    )?;
    let size =
        rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size)?;
    Ok((master, slave))
}

fn place_streams(streams: [Result<BorrowedFd<'_>, Errno>; STREAMS]) -> Result<(), Failure> {
    let mut lifted: [RawFd; STREAMS] = [-1; STREAMS];
    for (number, fd) in streams.into_iter().enumerate() {
        lifted[number] = fd.and_then(lift).at_nth(Step::PlaceStream, number)?;
    }
    for (number, &from) in lifted.iter().enumerate() {
        process::duplicate_to(from, number as RawFd).at_nth(Step::PlaceStream, number)?;
    }
    Ok(())
}

/// The deliveries at their numbers and in the environment; everything else closes at exec.
fn take_deliveries(command: &Command<'_>, deliveries: &Handover) -> Result<(), Failure> {
    let slate = slate(command.plan).at(Step::PlaceDelivery)?;
    let count = slate.count(lists::DELIVERIES);
    let mut lifted: [RawFd; LIFTED as usize] = [-1; LIFTED as usize];
    let mut highest = 2;
    for index in 0..count {
        let number = slate.number(lists::DELIVERIES, index).at_nth(Step::PlaceDelivery, index)?;
        let fd = deliveries.nth(index).at_nth(Step::PlaceDelivery, index)?;
        if number == lists::ENVIRONMENT {
            let size = rustix::fs::fstat(fd).at_nth(Step::Environment, index)?.st_size;
            let mapping = ReadMapping::new(fd, size as usize).at_nth(Step::Environment, index)?;
            for entry in mapping.c_strings().at_nth(Step::Environment, index)? {
                slate.place(lists::ENVP, entry).at_nth(Step::Environment, index)?;
            }
            command.mappings[index].set(Some(mapping));
            continue;
        }
        let number = usize::try_from(number).ok().filter(|n| *n >= STREAMS);
        let number = number.ok_or(Errno::BADF).at_nth(Step::PlaceDelivery, index)?;
        let slot = lifted.get_mut(number).ok_or(Errno::BADF);
        *slot.at_nth(Step::PlaceDelivery, index)? = lift(fd).at_nth(Step::PlaceDelivery, index)?;
        highest = highest.max(number);
    }
    for (number, &from) in lifted.iter().enumerate() {
        if from >= 0 {
            process::duplicate_to(from, number as RawFd).at_nth(Step::PlaceDelivery, number)?;
        }
    }
    process::close_on_exec_from(highest as u32 + 1).at(Step::Descriptors)
}

fn lift(fd: BorrowedFd<'_>) -> Result<RawFd, Errno> {
    let lifted = rustix::io::fcntl_dupfd_cloexec(fd, LIFTED)?;
    let number = lifted.as_raw_fd();
    // Owned by the table of a process that is about to execute.
    std::mem::forget(lifted);
    Ok(number)
}

/// Tries the candidates as execvp(3) does, but runs no shell on what is not executable.
fn execute(command: &Command<'_>) -> Failure {
    let failed = |errno| Failure { step: Step::Exec, errno, which: 0 };
    let slate = match slate(command.plan) {
        Ok(slate) => slate,
        Err(e) => return failed(e),
    };
    let mut errno = Errno::NOENT;
    for index in 0..slate.count(lists::PROGRAMS) {
        let program = match slate.string(lists::PROGRAMS, index) {
            Ok(program) => program,
            Err(e) => return failed(e),
        };
        command.executed.set(true);
        let refused = slate.execve(program, lists::ARGV, lists::ENVP);
        command.executed.set(false);
        match refused {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => errno = Errno::ACCESS,
            other => {
                errno = other;
                break;
            }
        }
    }
    failed(errno)
}
