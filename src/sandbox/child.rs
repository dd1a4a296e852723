//! From clone to exec: applies a [`Plan`], one step a paragraph, in the one order that works.
//!
//! Receives the plan by reference in a copy of the launcher's memory; never returns. Must never
//! allocate, lock, panic, or decide: a failed step crosses the socket as (step, errno) and the
//! launcher, which has words, renders it.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use super::init;
use super::plan::{Handed, Plan, ProcMount, Streams};
use super::step::{Said, Step, Told, listen, say};
use crate::sys::exec::ReadMapping;
use crate::sys::mount::{self, MountAttributes};
use crate::sys::socket::MAX_FDS;
use crate::sys::{exec, ids, landlock, memory, net, process, seccomp};

/// Status of a child that failed before the command ran. The launcher goes by the words it was told.
const FAILED: i32 = 125;

/// Descriptors are first lifted to here, so that placing one never overwrites another.
const LIFTED: RawFd = 3 + MAX_FDS as RawFd;

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

/// What came with the go: one descriptor a delivery, in the plan's order, then the secrets' mount.
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
    for &(first, last) in &plan.close_before {
        process::close_range(first, last).at(Step::Descriptors)?;
    }

    let early_proc = match plan.proc_mount {
        ProcMount::Inside => None,
        ProcMount::BeforeUserNamespace => {
            let proc = make_proc().at(Step::MountProcBeforeUserNamespace)?;
            process::unshare(plan.late_namespaces).at(Step::EnterUserNamespace)?;
            say(plan.socket.as_fd(), Said::NeedsMaps, &[]).at(Step::AwaitMaps)?;
            Some(proc)
        }
    };

    match listen(plan.socket.as_fd(), drop).at(Step::AwaitMaps)? {
        Some(Told::Maps) => {}
        Some(_) => return Err(Errno::PROTO).at(Step::AwaitMaps),
        None => return Err(Errno::PIPE).at(Step::AwaitMaps),
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

    build_root(plan, early_proc)?;

    rustix::system::sethostname(plan.hostname.to_bytes()).at(Step::Hostname)?;
    if plan.loopback {
        net::bring_loopback_up().at(Step::Loopback)?;
    }

    let ruleset = take_places(plan)?;

    let terminal = match plan.streams {
        Streams::Pipes { .. } => None,
        Streams::Terminal { rows, columns } => {
            Some(open_terminal(rows, columns).at(Step::Terminal)?)
        }
    };
    match &terminal {
        Some((master, _)) => say(plan.socket.as_fd(), Said::Ready, &[master.as_fd()]),
        None => say(plan.socket.as_fd(), Said::Ready, &[]),
    }
    .at(Step::AwaitGo)?;

    let mut handover = Handover::empty();
    let secrets = match listen(plan.socket.as_fd(), |fd| handover.push(fd)).at(Step::AwaitGo)? {
        Some(Told::Go { secrets }) => secrets,
        Some(_) => return Err(Errno::PROTO).at(Step::AwaitGo),
        None => return Err(Errno::PIPE).at(Step::AwaitGo),
    };
    if secrets {
        let tree = handover.nth(plan.deliveries.len()).at(Step::AttachSecrets)?;
        attach_secrets(tree).at(Step::AttachSecrets)?;
    }

    ids::drop_all_capabilities().at(Step::DropCapabilities)?;
    // The UTS namespace is ours: with CAP_SYS_ADMIN over it this would succeed.
    must_refuse(rustix::system::sethostname(b"sublet"), Errno::PERM).at(Step::CheckCapabilities)?;
    process::set_no_new_privileges().at(Step::NoNewPrivileges)?;

    let slave = terminal.as_ref().map(|(_, slave)| slave.as_fd());
    let command = spawn(plan, ruleset.as_ref().map(AsFd::as_fd), &handover, slave)?;
    // The command has its own copies; what init kept would hold pipes and deliveries open.
    drop((handover, terminal, ruleset));
    for &(first, last) in &plan.close_after {
        process::close_range(first, last).at(Step::Init)?;
    }
    match command {
        Some(pid) => init::run(plan, pid).at(Step::Init),
        // The command's side has already said why.
        None => Ok(FAILED),
    }
}

fn build_root(plan: &Plan, early_proc: Option<OwnedFd>) -> Result<(), Failure> {
    // Over "/": every root file system has that mount point. The old root lies beneath until the pivot.
    attach(plan.root.as_fd(), c"/").at(Step::AttachRoot)?;
    rustix::process::fchdir(&plan.root).at(Step::AttachRoot)?;

    for (index, attachment) in plan.attachments.iter().enumerate() {
        attach(attachment.tree.as_fd(), &attachment.at).at_nth(Step::Attach, index)?;
    }

    let proc = match early_proc {
        Some(proc) => proc,
        None => make_proc().at(Step::MountProc)?,
    };
    attach(proc.as_fd(), c"proc").at(Step::MountProc)?;
    let pts = make_pts().at(Step::MountPts)?;
    attach(pts.as_fd(), c"dev/pts").at(Step::MountPts)?;

    mount::pivot_to_current_directory().at(Step::Pivot)
}

/// Takes the landlock ruleset and the workspace's tree, which the launcher made meanwhile.
fn take_places(plan: &Plan) -> Result<Option<OwnedFd>, Failure> {
    let mut places = Handover::empty();
    let (ruleset, workspace) =
        match listen(plan.socket.as_fd(), |fd| places.push(fd)).at(Step::AwaitPlaces)? {
            Some(Told::Places { ruleset, workspace }) => (ruleset, workspace),
            Some(_) => return Err(Errno::PROTO).at(Step::AwaitPlaces),
            None => return Err(Errno::PIPE).at(Step::AwaitPlaces),
        };
    if let (true, Some(at)) = (workspace, &plan.workspace_at) {
        let tree = places.nth(usize::from(ruleset)).at(Step::AttachWorkspace)?;
        attach(tree, at).at(Step::AttachWorkspace)?;
    }
    for (index, attachment) in plan.attachments_in_workspace.iter().enumerate() {
        attach_without_links(attachment.tree.as_fd(), &attachment.at)
            .at_nth(Step::Attach, plan.attachments.len() + index)?;
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
    ruleset: Option<BorrowedFd<'a>>,
    handover: &'a Handover,
    terminal: Option<BorrowedFd<'a>>,
    failed: bool,
}

/// Starts the command. `None` if it could not be executed, which it has then said itself.
fn spawn(
    plan: &mut Plan,
    ruleset: Option<BorrowedFd<'_>>,
    handover: &Handover,
    terminal: Option<BorrowedFd<'_>>,
) -> Result<Option<i32>, Failure> {
    // Environment deliveries are mapped, not read: execve copies from the sealed memfd's own pages,
    // and no other copy ever stands in this process.
    let mut mappings: [Option<ReadMapping>; MAX_FDS] = [const { None }; MAX_FDS];
    for (index, handed) in plan.deliveries.iter().enumerate() {
        if *handed == Handed::Environment {
            let fd = handover.nth(index).at_nth(Step::Environment, index)?;
            let size = rustix::fs::fstat(fd).at_nth(Step::Environment, index)?.st_size;
            mappings[index] =
                Some(ReadMapping::new(fd, size as usize).at_nth(Step::Environment, index)?);
        }
    }
    for (index, mapping) in mappings.iter().enumerate() {
        if let Some(mapping) = mapping {
            let entry = mapping.c_str().at_nth(Step::Environment, index)?;
            plan.envp.place(entry).at_nth(Step::Environment, index)?;
        }
    }
    let mut stack = std::mem::take(&mut plan.stack);
    let mut command = Command { plan, ruleset, handover, terminal, failed: false };
    let pid = process::spawn_until_exec(command_entry, &mut command, &mut stack).at(Step::Spawn)?;
    let started = !command.failed;
    std::mem::forget(stack);
    if started {
        say(command.plan.socket.as_fd(), Said::Started, &[]).at(Step::Spawn)?;
    }
    Ok(started.then_some(pid))
}

fn command_entry(command: &mut Command<'_>) -> i32 {
    let failure = match Lifted::of(command) {
        Err(failure) => failure,
        Ok(lifted) => {
            let failure = become_command(command, &lifted);
            command.failed = true;
            fail(lifted.socket.as_fd(), &failure)
        }
    };
    command.failed = true;
    fail(command.plan.socket.as_fd(), &failure)
}

/// What is still needed after the low numbers have been given away.
struct Lifted {
    socket: OwnedFd,
    ruleset: Option<OwnedFd>,
}

impl Lifted {
    fn of(command: &Command<'_>) -> Result<Self, Failure> {
        let lift = |fd| rustix::io::fcntl_dupfd_cloexec(fd, LIFTED);
        Ok(Self {
            socket: lift(command.plan.socket.as_fd()).at(Step::Descriptors)?,
            ruleset: command.ruleset.map(lift).transpose().at(Step::Descriptors)?,
        })
    }
}

/// Returns only the failure: success is another program.
fn become_command(command: &Command<'_>, lifted: &Lifted) -> Failure {
    match restrict(command, lifted) {
        Ok(()) => execute(command.plan),
        Err(failure) => failure,
    }
}

fn restrict(command: &Command<'_>, lifted: &Lifted) -> Result<(), Failure> {
    let plan = command.plan;
    process::join_new_session_keyring().at(Step::Keyring)?;
    rustix::process::setsid().at(Step::Session)?;

    place_descriptors(command)?;
    if command.terminal.is_some() {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).at(Step::Terminal)?;
    }
    process::unblock_signals().at(Step::Init)?;
    rustix::process::umask(plan.umask);
    rustix::process::chdir(&*plan.working_directory).at(Step::WorkingDirectory)?;
    for (index, limit) in plan.limits.iter().enumerate() {
        ids::limit(limit.resource, limit.soft, limit.hard).at_nth(Step::Limits, index)?;
    }

    if let Some(ruleset) = &lifted.ruleset {
        landlock::restrict_self(ruleset).at(Step::Landlock)?;
        // Readable by its mode and its mount; no landlock rule covers it.
        let probe = rustix::fs::open(super::layout::LANDLOCK_PROBE, OFlags::CLOEXEC, Mode::empty());
        must_refuse(probe, Errno::ACCESS).at(Step::CheckLandlock)?;
    }
    errno(seccomp::install(&plan.filter)).at(Step::Seccomp)?;
    errno(seccomp::see_it_refused()).at(Step::CheckSeccomp)
}

/// 0, 1, 2 and the deliveries at their numbers; everything else closes at exec.
fn place_descriptors(command: &Command<'_>) -> Result<(), Failure> {
    let plan = command.plan;
    let streams: [BorrowedFd<'_>; 3] = match (&plan.streams, command.terminal) {
        (Streams::Pipes { stdin, stdout, stderr }, _) => {
            [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]
        }
        (Streams::Terminal { .. }, Some(slave)) => [slave, slave, slave],
        (Streams::Terminal { .. }, None) => return Err(Errno::BADF).at(Step::Terminal),
    };
    let mut lifted: [RawFd; 3 + MAX_FDS] = [-1; 3 + MAX_FDS];
    for (number, fd) in streams.into_iter().enumerate() {
        lifted[number] = lift(fd).at_nth(Step::PlaceDelivery, number)?;
    }
    let mut highest = 2;
    for (index, handed) in plan.deliveries.iter().enumerate() {
        if let Handed::Descriptor { number } = *handed {
            let fd = command.handover.nth(index).at_nth(Step::PlaceDelivery, index)?;
            lifted[number as usize] = lift(fd).at_nth(Step::PlaceDelivery, index)?;
            highest = highest.max(number);
        }
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
fn execute(plan: &Plan) -> Failure {
    let mut errno = Errno::NOENT;
    for program in &plan.programs {
        match exec::execve(program, &plan.argv, &plan.envp) {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => errno = Errno::ACCESS,
            other => {
                errno = other;
                break;
            }
        }
    }
    Failure { step: Step::Exec, errno, which: 0 }
}
