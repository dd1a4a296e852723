//! From clone to exec: applies a [`Plan`], one step a paragraph, in the one order that works.
//!
//! Receives the plan by reference in a copy of the launcher's memory, and what comes later over the
//! socket and in the slate; never returns. Must never allocate, lock, panic, or decide: a failed step
//! crosses the socket as (step, errno) and the launcher, which has words, renders it.
//!
//! In two stretches: what is the same for every exec (namespaces, away from the host's mounts into a root
//! that is still empty), for which it may have been cloned before there is one; and what it is told then.
//!
//! Two processes: init builds the sandbox; the command's process, which shares init's memory until it
//! executes, puts every wall around itself. Only then does it take its command, for which it may wait as
//! long as the launcher likes (a warm sandbox), and then the go. Init only watches the lifeline meanwhile.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use super::plan::{Plan, ProcMount, WORKSPACE, lists};
use super::seccomp::BuiltIn;
use super::step::{Said, Step, Told, listen, say};
use super::{command, init};
use crate::sys::mount::{self, MountAttributes};
use crate::sys::slate::{Place, Slate};
use crate::sys::socket::MAX_FDS;
use crate::sys::{cpu, ids, landlock, memory, net, process};

/// Status of a child that failed before the command ran. The launcher goes by the words it was told.
const FAILED: i32 = 125;

/// A step that failed, and which of several it was.
pub(super) struct Failure {
    pub step: Step,
    pub errno: Errno,
    pub which: u32,
}

pub(super) trait At<T> {
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
pub(super) struct Handover {
    fds: [Option<OwnedFd>; MAX_FDS],
    count: usize,
}

impl Handover {
    pub const fn empty() -> Self {
        Self { fds: [const { None }; MAX_FDS], count: 0 }
    }

    pub fn push(&mut self, fd: OwnedFd) {
        if let Some(slot) = self.fds.get_mut(self.count) {
            *slot = Some(fd);
            self.count += 1;
        }
    }

    pub fn nth(&self, index: usize) -> Result<BorrowedFd<'_>, Errno> {
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

pub(super) fn fail(socket: BorrowedFd<'_>, failure: &Failure) -> ! {
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
    if plan.shares_descriptors {
        let last = own_descriptors(plan).into_iter().flatten().max().unwrap_or_default();
        process::leave_shared_descriptors(last + 1).at(Step::Descriptors)?;
        say(plan.socket.as_fd(), Said::Apart, &[]).at(Step::Descriptors)?;
    }
    // Only speed hangs on it.
    match cpu::leave_to_waker(plan.launchers_cpu) {
        Ok(()) | Err(_) => {}
    }
    // Signals of the launcher's terminal are not for init; it reads SIGCHLD from a descriptor.
    process::block_all_signals().at(Step::Init)?;

    // Among what is closed here are the launcher's own ends of our socket and lifeline, without which
    // neither would ever show its death.
    close_all_but(plan, [None; 2]).at(Step::Descriptors)?;

    if let Some(network) = plan.network.take() {
        process::enter_namespace(network.as_fd(), libc::CLONE_NEWNET).at(Step::JoinNetwork)?;
    }
    let proc = match plan.proc_mount {
        ProcMount::Inside => {
            process::unshare(plan.late_namespaces).at(Step::EnterNetworkNamespace)?;
            // While the host's is still in sight: the kernel gives a user namespace no other where it shows
            // none whole (mount_too_revealing).
            make_proc().at(Step::MountProc)?
        }
        ProcMount::BeforeUserNamespace => {
            let proc = make_proc().at(Step::MountProcBeforeUserNamespace)?;
            process::unshare(plan.late_namespaces).at(Step::EnterUserNamespace)?;
            say(plan.socket.as_fd(), Said::NeedsMaps, &[]).at(Step::AwaitMaps)?;
            proc
        }
    };

    // Away from the host's mounts at once: taking them down takes the kernel a while, in which the launcher
    // builds in the new root.
    enter_root(plan.root.as_ref().ok_or(Errno::BADF).at(Step::AttachRoot)?)?;
    rustix::system::sethostname(plan.hostname.to_bytes()).at(Step::Hostname)?;
    if plan.loopback {
        net::bring_loopback_up().at(Step::Loopback)?;
    }
    ids::drop_bounding_set().at(Step::DropBoundingSet)?;

    let mut lock = None;
    let maps = told(plan, |fd| lock = Some(fd)).at(Step::AwaitMaps)?;
    let Told::Maps { uid, gid, drop_groups } = maps else {
        return Err(Errno::PROTO).at(Step::AwaitMaps);
    };
    plan.uid_lock = lock;

    // Rootless, the launcher was dumpable for the maps' sake. Nobody of this user looks into init.
    errno(memory::set_dumpable(false)).at(Step::BecomeUser)?;

    // Keeps the namespace's capabilities (NO_SETUID_FIXUP): the mounts below need them.
    ids::become_user(uid, gid, drop_groups).at(Step::BecomeUser)?;

    // After the change of credentials, which clears it; then once more whether that came too late.
    process::die_with_parent().at(Step::DieWithParent)?;
    init::check_lifeline(plan.lifeline.as_fd()).at(Step::CheckLifeline)?;

    // What needs no tree is done while the launcher makes them.
    let pts = make_pts().at(Step::MountPts)?;

    take_trees(plan, lists::TREES, 0, attach)?;
    attach(proc.as_fd(), c"proc").at(Step::MountProc)?;
    attach(pts.as_fd(), c"dev/pts").at(Step::MountPts)?;
    let (ruleset, filter) = take_places(plan)?;
    drop((proc, pts));

    ids::drop_all_capabilities().at(Step::DropCapabilities)?;
    // The UTS namespace is ours: with CAP_SYS_ADMIN over it this would succeed.
    must_refuse(rustix::system::sethostname(b"sublet"), Errno::PERM).at(Step::CheckCapabilities)?;
    process::set_no_new_privileges().at(Step::NoNewPrivileges)?;

    plan.root = None;
    let command = command::spawn(plan, ruleset, filter)?;
    plan.slate = None;
    match command {
        Some((pid, children)) => init::run(plan, pid, &children).at(Step::Init),
        // The command's side has already said why.
        None => Ok(FAILED),
    }
}

fn own_descriptors(plan: &Plan) -> [Option<u32>; 5] {
    let [lock, root, network] = [&plan.uid_lock, &plan.root, &plan.network].map(Option::as_ref);
    let kept = [Some(&plan.socket), Some(&plan.lifeline), lock, root, network];
    kept.map(|fd| fd.map(|fd| fd.as_raw_fd().unsigned_abs()))
}

/// Closes every descriptor but this process's own and those.
pub(super) fn close_all_but(plan: &Plan, also: [Option<BorrowedFd<'_>>; 2]) -> Result<(), Errno> {
    let also = also.map(|fd| fd.map(|fd| fd.as_raw_fd().unsigned_abs()));
    let [a, b, c, d, e] = own_descriptors(plan);
    let mut numbers = [a, b, c, d, e, also[0], also[1]];
    numbers.sort_unstable();
    let mut from = 0;
    for number in numbers.into_iter().flatten() {
        if from < number {
            process::close_range(from, number - 1)?;
        }
        from = number + 1;
    }
    process::close_range(from, u32::MAX)
}

/// The launcher's next word, however long it takes; not longer than the launcher lives.
fn told(plan: &Plan, take: impl FnMut(OwnedFd)) -> Result<Told, Errno> {
    init::wait_for_either(plan.socket.as_fd(), plan.lifeline.as_fd())?;
    listen(plan.socket.as_fd(), take)?.ok_or(Errno::PIPE)
}

pub(super) fn slate(plan: &Plan) -> Result<&Slate, Errno> {
    plan.slate.as_ref().ok_or(Errno::BADMSG)
}

/// Over "/": every root file system has that mount point. The old root lies beneath until the pivot.
fn enter_root(root: &OwnedFd) -> Result<(), Failure> {
    attach(root.as_fd(), c"/").at(Step::AttachRoot)?;
    rustix::process::fchdir(root).at(Step::AttachRoot)?;
    mount::pivot_to_current_directory().at(Step::Pivot)
}

/// Attaches the trees of one of the slate's lists, packet after packet. `before`: how many other trees
/// the launcher counts before them.
fn take_trees(
    plan: &Plan,
    list: Place,
    before: usize,
    attach: impl Fn(BorrowedFd<'_>, &CStr) -> Result<(), Errno>,
) -> Result<(), Failure> {
    let mut index = 0;
    // There is always a first packet of `TREES`, after which the slate can be read.
    let mut is_awaited = list == lists::TREES;
    while is_awaited || index < slate(plan).at(Step::AwaitTrees)?.count(list) {
        let mut trees = Handover::empty();
        match told(plan, |fd| trees.push(fd)).at(Step::AwaitTrees)? {
            Told::Trees if is_awaited || trees.count > 0 => {}
            _ => return Err(Errno::PROTO).at(Step::AwaitTrees),
        }
        is_awaited = false;
        let slate = slate(plan).at(Step::AwaitTrees)?;
        for tree in trees.fds.iter().flatten() {
            let at = slate.string(list, index).at(Step::AwaitTrees)?;
            attach(tree.as_fd(), at).at_nth(Step::Attach, before + index)?;
            index += 1;
        }
    }
    Ok(())
}

/// Takes the landlock ruleset and the workspace's tree, which the launcher made meanwhile.
fn take_places(plan: &Plan) -> Result<(Option<OwnedFd>, BuiltIn), Failure> {
    let mut places = Handover::empty();
    let told = told(plan, |fd| places.push(fd)).at(Step::AwaitPlaces)?;
    let Told::Places { ruleset, workspace, secrets, foreign, filter } = told else {
        return Err(Errno::PROTO).at(Step::AwaitPlaces);
    };
    let filter = BuiltIn::of_number(filter).ok_or(Errno::BADMSG).at(Step::AwaitPlaces)?;
    if workspace {
        let at = slate(plan).and_then(|slate| slate.string(lists::PLACES, WORKSPACE));
        let tree = places.nth(usize::from(ruleset)).at(Step::AttachWorkspace)?;
        let attach = if foreign { attach_without_links } else { attach };
        attach(tree, at.at(Step::AttachWorkspace)?).at(Step::AttachWorkspace)?;
    }
    let before = slate(plan).at(Step::AwaitPlaces)?.count(lists::TREES);
    take_trees(plan, lists::TREES_IN_WORKSPACE, before, attach_without_links)?;
    if secrets {
        let tree = places.nth(usize::from(ruleset) + usize::from(workspace));
        attach_secrets(tree.at(Step::AttachSecrets)?).at(Step::AttachSecrets)?;
    }
    if !ruleset {
        return Ok((None, filter));
    }
    let ruleset = places.fds[0].take().ok_or(Errno::BADMSG).at(Step::LandlockRules)?;
    for (index, rule) in plan.inner_rules.iter().enumerate() {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::open(&*rule.path, flags, Mode::empty())
            .and_then(|place| landlock::allow_beneath(&ruleset, &place, rule.access))
            .at_nth(Step::LandlockRules, index)?;
    }
    Ok((Some(ruleset), filter))
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

/// The number of a system call's error; such an error holds nothing on the heap.
pub fn errno<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}

/// `Ok` only if the forbidden thing failed as it must.
pub(super) fn must_refuse<T>(tried: Result<T, Errno>, expected: Errno) -> Result<(), Errno> {
    match tried {
        Err(e) if e == expected => Ok(()),
        Err(e) => Err(e),
        // It worked: the wall is not there.
        Ok(_) => Err(Errno::NOTRECOVERABLE),
    }
}
