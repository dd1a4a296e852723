//! From clone to exec: applies a [`Plan`], one step a paragraph, in the one order that works.
//!
//! Receives the plan by reference in a copy of the launcher's memory, and what comes later over the
//! socket and in the slate; never returns. Must never allocate, lock, panic, or decide: a failed step
//! crosses the socket as (step, errno) and the launcher, which has words, renders it.
//!
//! Two processes: init builds the sandbox; the command's process, which shares init's memory until it
//! executes, puts every wall around itself. Only then does it take its command, for which it may wait as
//! long as the launcher likes (a warm sandbox), and then the go. Init only watches the lifeline meanwhile.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use super::init;
use super::plan::{Plan, ProcMount, lists};
use super::step::{Said, Step, Told, listen, say};
use crate::sys::exec::ReadMapping;
use crate::sys::mount::{self, MountAttributes};
use crate::sys::slate::{Place, Slate};
use crate::sys::socket::MAX_FDS;
use crate::sys::{ids, landlock, memory, net, process, seccomp};

/// Status of a child that failed before the command ran. The launcher goes by the words it was told.
const FAILED: i32 = 125;

/// Standard input, output and error.
const STREAMS: usize = 3;

/// Descriptors are first lifted to here, so that placing one never overwrites another.
const LIFTED: RawFd = (STREAMS + MAX_FDS) as RawFd;

/// A step that failed, and which of several it was.
struct Failure {
    step: Step,
    errno: Errno,
    which: u32,
}

trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
    fn at_nth(self, step: Step, which: usize) -> Result<T, Failure>;
}

impl<T> At<T> for Result<T, Errno> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.at_nth(step, 0)
    }

    fn at_nth(self, step: Step, which: usize) -> Result<T, Failure> {
        self.map_err(|errno| Failure { step, errno, which: which as u32 })
    }
}

/// Descriptors that came with one packet.
struct Handover {
    fds: [Option<OwnedFd>; MAX_FDS],
    count: usize,
}

impl Handover {
    const fn empty() -> Self {
        Self { fds: [const { None }; MAX_FDS], count: 0 }
    }

    fn push(&mut self, fd: OwnedFd) {
        if let Some(slot) = self.fds.get_mut(self.count) {
            *slot = Some(fd);
            self.count += 1;
        }
    }

    fn nth(&self, index: usize) -> Result<BorrowedFd<'_>, Errno> {
        self.fds.get(index).and_then(|fd| fd.as_ref()).map(AsFd::as_fd).ok_or(Errno::BADMSG)
    }
}

/// Becomes the exec's init. Called in the child of clone3.
pub fn run(plan: &mut Plan) -> ! {
    let failure = match become_init(plan) {
        Ok(status) => process::exit_now(status),
        Err(failure) => failure,
    };
    fail(plan.socket.as_fd(), &failure)
}

fn fail(socket: BorrowedFd<'_>, failure: &Failure) -> ! {
    let said = Said::Failed {
        step: failure.step,
        errno: failure.errno.raw_os_error(),
        which: failure.which,
    };
    // If the launcher is gone there is no one to tell, and this process ends either way.
    match say(socket, said, &[]) {
        Ok(()) | Err(_) => process::exit_now(FAILED),
    }
}

fn become_init(plan: &mut Plan) -> Result<i32, Failure> {
    // Signals of the launcher's terminal are not for init; it reads SIGCHLD from a descriptor.
    process::block_all_signals().at(Step::Init)?;

    // Among what is closed here are the launcher's own ends of our socket and lifeline, without which
    // neither would ever show its death.
    close_all_but_our_own(plan)?;

    let early_proc = match plan.proc_mount {
        ProcMount::Inside => {
            process::unshare(plan.late_namespaces).at(Step::EnterNetworkNamespace)?;
            None
        }
        ProcMount::BeforeUserNamespace => {
            let proc = make_proc().at(Step::MountProcBeforeUserNamespace)?;
            process::unshare(plan.late_namespaces).at(Step::EnterUserNamespace)?;
            say(plan.socket.as_fd(), Said::NeedsMaps, &[]).at(Step::AwaitMaps)?;
            Some(proc)
        }
    };

    match told(plan, drop).at(Step::AwaitMaps)? {
        Told::Maps => {}
        _ => return Err(Errno::PROTO).at(Step::AwaitMaps),
    }

    // Rootless, the launcher was dumpable for the maps' sake. Nobody of this user looks into init.
    errno(memory::set_dumpable(false)).at(Step::BecomeUser)?;

    // Keeps the namespace's capabilities (NO_SETUID_FIXUP): the mounts below need them.
    let identity = plan.identity;
    ids::become_user(identity.inside_uid, identity.inside_gid, identity.drop_groups)
        .at(Step::BecomeUser)?;

    // After the change of credentials, which clears it; then once more whether that came too late.
    process::die_with_parent().at(Step::DieWithParent)?;
    init::check_lifeline(plan.lifeline.as_fd()).at(Step::CheckLifeline)?;

    // What needs no tree is done while the launcher makes them.
    ids::drop_bounding_set().at(Step::DropBoundingSet)?;
    rustix::system::sethostname(plan.hostname.to_bytes()).at(Step::Hostname)?;
    if plan.loopback {
        net::bring_loopback_up().at(Step::Loopback)?;
    }
    let proc = match early_proc {
        Some(proc) => proc,
        None => make_proc().at(Step::MountProc)?,
    };
    let pts = make_pts().at(Step::MountPts)?;

    build_root(plan, proc.as_fd(), pts.as_fd())?;
    let ruleset = take_places(plan)?;
    drop((proc, pts));

    ids::drop_all_capabilities().at(Step::DropCapabilities)?;
    // The UTS namespace is ours: with CAP_SYS_ADMIN over it this would succeed.
    must_refuse(rustix::system::sethostname(b"sublet"), Errno::PERM).at(Step::CheckCapabilities)?;
    process::set_no_new_privileges().at(Step::NoNewPrivileges)?;

    let command = spawn(plan, ruleset.as_ref())?;
    drop(ruleset);
    plan.slate = None;
    close_all_but_our_own(plan)?;
    match command {
        Some(pid) => init::run(plan, pid).at(Step::Init),
        // The command's side has already said why.
        None => Ok(FAILED),
    }
}

fn close_all_but_our_own(plan: &Plan) -> Result<(), Failure> {
    for &(first, last) in &plan.close {
        process::close_range(first, last).at(Step::Descriptors)?;
    }
    Ok(())
}

/// The launcher's next word, however long it takes; not longer than the launcher lives.
fn told(plan: &Plan, take: impl FnMut(OwnedFd)) -> Result<Told, Errno> {
    init::wait_for_either(plan.socket.as_fd(), plan.lifeline.as_fd())?;
    listen(plan.socket.as_fd(), take)?.ok_or(Errno::PIPE)
}

fn slate(plan: &Plan) -> Result<&Slate, Errno> {
    plan.slate.as_ref().ok_or(Errno::BADMSG)
}

fn build_root(plan: &Plan, proc: BorrowedFd<'_>, pts: BorrowedFd<'_>) -> Result<(), Failure> {
    take_trees(plan, lists::TREES, 0, |index, tree, at| {
        attach(tree, at)?;
        // Over "/": every root file system has that mount point. The old root lies beneath until the
        // pivot; what follows is relative to the new one.
        if index == 0 { rustix::process::fchdir(tree) } else { Ok(()) }
    })?;
    attach(proc, c"proc").at(Step::MountProc)?;
    attach(pts, c"dev/pts").at(Step::MountPts)?;
    mount::pivot_to_current_directory().at(Step::Pivot)
}

/// Attaches the trees of one of the slate's lists, packet after packet. `before`: how many other trees
/// the launcher counts before them.
fn take_trees(
    plan: &Plan,
    list: Place,
    before: usize,
    attach: impl Fn(usize, BorrowedFd<'_>, &CStr) -> Result<(), Errno>,
) -> Result<(), Failure> {
    let mut index = 0;
    // The root is one of them: there is a first packet of `TREES`, after which the slate can be read.
    while index == 0 && list == lists::TREES
        || index < slate(plan).at(Step::AwaitTrees)?.count(list)
    {
        let mut trees = Handover::empty();
        match told(plan, |fd| trees.push(fd)).at(Step::AwaitTrees)? {
            Told::Trees if trees.count > 0 => {}
            _ => return Err(Errno::PROTO).at(Step::AwaitTrees),
        }
        let slate = slate(plan).at(Step::AwaitTrees)?;
        for tree in trees.fds.iter().flatten() {
            let at = slate.string(list, index).at(Step::AwaitTrees)?;
            let step = if before + index == 0 { Step::AttachRoot } else { Step::Attach };
            attach(index, tree.as_fd(), at).at_nth(step, before + index)?;
            index += 1;
        }
    }
    Ok(())
}

/// Takes the landlock ruleset and the workspace's tree, which the launcher made meanwhile.
fn take_places(plan: &Plan) -> Result<Option<OwnedFd>, Failure> {
    let mut places = Handover::empty();
    let told = told(plan, |fd| places.push(fd)).at(Step::AwaitPlaces)?;
    let Told::Places { ruleset, workspace, secrets } = told else {
        return Err(Errno::PROTO).at(Step::AwaitPlaces);
    };
    if let (true, Some(at)) = (workspace, &plan.workspace_at) {
        let tree = places.nth(usize::from(ruleset)).at(Step::AttachWorkspace)?;
        attach(tree, at).at(Step::AttachWorkspace)?;
    }
    let before = slate(plan).at(Step::AwaitPlaces)?.count(lists::TREES);
    take_trees(plan, lists::TREES_IN_WORKSPACE, before, |_, tree, at| {
        attach_without_links(tree, at)
    })?;
    if secrets {
        let tree = places.nth(usize::from(ruleset) + usize::from(workspace));
        attach_secrets(tree.at(Step::AttachSecrets)?).at(Step::AttachSecrets)?;
    }
    if !ruleset {
        return Ok(None);
    }
    let ruleset = places.fds[0].take().ok_or(Errno::BADMSG).at(Step::LandlockRules)?;
    for (index, rule) in plan.inner_rules.iter().enumerate() {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::open(&*rule.path, flags, Mode::empty())
            .and_then(|place| landlock::allow_beneath(&ruleset, &place, rule.access))
            .at_nth(Step::LandlockRules, index)?;
    }
    Ok(Some(ruleset))
}

fn attach(tree: BorrowedFd<'_>, at: &CStr) -> Result<(), Errno> {
    rustix::mount::move_mount(tree, c"", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// In the workspace, where an earlier exec may have put links that lead a mount elsewhere.
fn attach_without_links(tree: BorrowedFd<'_>, at: &CStr) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let place = rustix::fs::openat2(CWD, at, flags, Mode::empty(), resolve)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", place, c"", flags)
}

fn make_proc() -> Result<OwnedFd, Errno> {
    let proc = rustix::mount::fsopen(c"proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&proc)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&proc, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn make_pts() -> Result<OwnedFd, Errno> {
    let pts = rustix::mount::fsopen(c"devpts", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_flag(&pts, c"newinstance")?;
    rustix::mount::fsconfig_set_string(&pts, c"ptmxmode", c"0666")?;
    rustix::mount::fsconfig_set_string(&pts, c"mode", c"0620")?;
    rustix::mount::fsconfig_create(&pts)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&pts, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// The command gets a read-only clone of the deliveries' mount; the launcher keeps its writable
/// descriptors. A clone of a mount that is attached in this namespace, because older kernels clone no
/// detached one (before Linux 6.15).
fn attach_secrets(tree: BorrowedFd<'_>) -> Result<(), Errno> {
    const AT: &CStr = c"/run/sublet/secrets";
    attach(tree, AT)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let read_only = rustix::mount::open_tree(CWD, AT, flags)?;
    let attributes = MountAttributes {
        set: mount::RDONLY | mount::NOSUID | mount::NODEV | mount::NOEXEC,
        ..MountAttributes::default()
    };
    mount::set_attributes(&read_only, &attributes)?;
    rustix::mount::unmount(AT, UnmountFlags::DETACH)?;
    attach(read_only.as_fd(), AT)
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

/// The number of a system call's error; such an error holds nothing on the heap.
pub fn errno<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

/// `Ok` only if the forbidden thing failed as it must.
fn must_refuse<T>(tried: Result<T, Errno>, expected: Errno) -> Result<(), Errno> {
    match tried {
        Err(e) if e == expected => Ok(()),
        Err(e) => Err(e),
        // It worked: the wall is not there.
        Ok(_) => Err(Errno::NOTRECOVERABLE),
    }
}

/// What the command's process gets; it shares this memory until it has executed.
struct Command<'a> {
    plan: &'a Plan,
    ruleset: Option<&'a OwnedFd>,
    /// Environment deliveries are mapped, not read: execve copies from the sealed memfd's own pages, and
    /// no other copy ever stands in this memory. Unmapped by init, when the command has executed.
    mappings: [Cell<Option<ReadMapping>>; MAX_FDS],
    /// It came as far as an execve that did not return.
    executed: Cell<bool>,
}

/// Starts the command. `None` if it could not be executed, which it has then said itself.
fn spawn(plan: &Plan, ruleset: Option<&OwnedFd>) -> Result<Option<i32>, Failure> {
    let command = Command {
        plan,
        ruleset,
        mappings: [const { Cell::new(None) }; MAX_FDS],
        executed: Cell::new(false),
    };
    let lifeline = plan.lifeline.as_fd();
    let pid = process::spawn_until_exec(command_entry, &command, |executed| {
        init::wait_for_either(executed, lifeline)
    })
    .at(Step::Spawn)?;
    let executed = command.executed.get();
    if executed {
        say(plan.socket.as_fd(), Said::Started, &[]).at(Step::Spawn)?;
    }
    Ok(executed.then_some(pid))
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
    /// Init waits for its end.
    _executed: OwnedFd,
}

impl Kept {
    fn of(command: &Command<'_>, executed: BorrowedFd<'_>) -> Result<Self, Failure> {
        let lift = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, LIFTED);
        Ok(Self {
            socket: lift(command.plan.socket.as_fd()).at(Step::Descriptors)?,
            _executed: lift(executed).at(Step::Descriptors)?,
        })
    }
}

fn become_command(command: &Command<'_>, kept: &Kept) -> Result<(), Failure> {
    process::join_new_session_keyring().at(Step::Keyring)?;
    rustix::process::setsid().at(Step::Session)?;
    rustix::process::umask(command.plan.umask);
    rustix::process::chdir(&*command.plan.working_directory).at(Step::WorkingDirectory)?;

    if let Some(ruleset) = command.ruleset {
        landlock::restrict_self(ruleset).at(Step::Landlock)?;
        // Readable by its mode and its mount; no landlock rule covers it.
        let probe = rustix::fs::open(super::layout::LANDLOCK_PROBE, OFlags::CLOEXEC, Mode::empty());
        must_refuse(probe, Errno::ACCESS).at(Step::CheckLandlock)?;
    }
    errno(seccomp::install(&command.plan.filter)).at(Step::Seccomp)?;
    errno(seccomp::see_it_refused()).at(Step::CheckSeccomp)?;

    // The walls stand. What follows are calls that every command needs to be of any use.
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
    take_deliveries(command, &deliveries)?;
    std::mem::forget(deliveries);
    // After the descriptors, which may have larger numbers than their limit.
    for (index, limit) in command.plan.limits.iter().enumerate() {
        ids::limit(limit.resource, limit.soft, limit.hard).at_nth(Step::Limits, index)?;
    }
    process::unblock_signals().at(Step::Init)
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
            let entry = mapping.c_str().at_nth(Step::Environment, index)?;
            slate.place(lists::ENVP, entry).at_nth(Step::Environment, index)?;
            command.mappings[index].set(Some(mapping));
            continue;
        }
        let slot = usize::try_from(number).ok().filter(|n| *n >= STREAMS);
        let slot = slot.and_then(|n| lifted.get_mut(n)).ok_or(Errno::BADF);
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
